"""`train.py --replay STEP`: the step is the run's own, and a defect is found where it was planted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.launching import python, succeed, torchrun
from tests.integration.defect_worker import MODULE

HERE = Path(__file__).parent
PLAIN = [
    *("augment.scale=[1, 1]", "augment.ratio=[1, 1]", "augment.hflip=0", "augment.erase_prob=0", "augment.mix=null"),
    *("schedule.cosine=5 steps", "global_batch_size=8", "trainer.micro_batch_size=2", "model.num_classes=3"),
    *("trainer.eval_every=50 steps", "trainer.save_every=2 steps", "trainer.max_nonfinite_steps=1"),
]
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp", "activation_checkpointing=full"],
    "zero3": ["engine=zero", "zero.stage=3"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class c is bright in channel c; there is a single training image of class 2 among 40."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in (("train", (20, 19, 1)), ("val", (1, 1, 1))):
        for label, count in enumerate(counts):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 190
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    config = ["--config", str(HERE.parent / "helpers/golden.yaml"), "--data_dir", str(images), "--tag", "a"]
    return [*config, f"output_dir={out}", *PLAIN, *more]


def launch(defect: str, *words: str):
    return torchrun(2, HERE / "defect_worker.py", defect, *words, timeout=300)


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("engine", "kind"),
    [("fsdp", "gradient"), *(pytest.param(name, "output", marks=pytest.mark.slow) for name in ("ddp", "zero3"))],
)
def test_a_defect_is_found_where_it_was_planted(engine, kind, images, tmp_path):
    """From the run that stops at it, and says the command, to the module, which no shard or recomputation hides."""
    words = arguments(images, tmp_path, *ENGINES[engine])
    stopped = launch(kind, *words)
    error = re.search(r"error: 1 updates in a row were refused.*", stopped.stderr)
    assert error, stopped.stderr[-3000:]
    what = {"output": "loss", "gradient": "gradient"}[kind]
    rank = int(re.search(rf"{what} of 1 samples on rank (\d): class_2/0.png", error[0])[1])
    step = int(re.search(r"--replay (\d+)", error[0])[1])

    before = contents(tmp_path)
    told = succeed(launch(kind, *words, "--replay", str(step))).stdout
    assert contents(tmp_path) == before
    assert re.search(rf"^step {step}: loss .*, update REFUSED$", told, re.M)
    (sample,) = re.findall(r"^ +(\d)  (\S+) +(class_2/0\.png) \(class_2\)$", told, re.M)
    assert sample[0] == str(rank)
    assert (sample[1] == "nan") == (kind == "output")
    assert len(re.findall(r"\.png \(class_\d\)$", told, re.M)) == 8
    found = re.search(rf"^rank {rank}: first {kind} that is not finite: (of the output of )?(\S+) ", told, re.M)
    if kind == "output":
        assert found[2] == MODULE
        assert re.search(rf"^rank {rank}:   its input: .*, 0 not finite$", told, re.M)
    else:
        assert found[2] == MODULE.replace("mlp", "norm2")  # whose output the module takes
    other = told.split(f"rank {1 - rank}: ")[1].splitlines()[0]
    assert other == "the outputs of all modules are finite"


@pytest.mark.dist
@pytest.mark.slow
def test_a_replayed_step_is_the_runs_own(images, tmp_path):
    """To the bit, from the newest checkpoint before it, or from the beginning; and what is not there is said."""
    words = arguments(images, tmp_path, "engine=ddp", "model.drop_path=0.3", "trainer.deterministic=true")
    succeed(launch("none", *words))
    rows = {row["step"]: row for row in rows_of(tmp_path / "a") if row["kind"] == "train"}
    for step, more in ((4, []), (1, ["--resume", "none"])):
        done = succeed(launch("none", *words, "--replay", str(step), *more))
        assert f"from step {0 if more else 2}\n" in done.stderr
        first, *_ = done.stdout.splitlines()
        assert first == f"step {step}: loss {rows[step]['loss']:.6g}, gradient norm {rows[step]['grad_norm']:.6g}"
        assert done.stdout.count("the gradients of all outputs are finite") == 2
    alone = succeed(python("train.py", *words, "trainer.micro_batch_size=4", "--replay", "3"))
    assert "on 1 processes, where 2 trained" in alone.stderr
    for step, message in ((1, "no checkpoint to replay from"), (6, "no such step")):
        refused = python("train.py", *words, "--replay", str(step))
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("error: ")
        assert message in refused.stderr


def test_a_deterministic_run_refuses_what_is_not(images, tmp_path):
    """An operation that may give other bits in every run ends it, where it passes otherwise."""
    words = arguments(images, tmp_path, "engine=ddp", "schedule.cosine=1 steps")
    done = python(HERE / "defect_worker.py", "put", *words, "trainer.deterministic=true")
    assert done.returncode == 1
    assert "does not have a deterministic implementation" in done.stderr
    succeed(python(HERE / "defect_worker.py", "put", *words))
