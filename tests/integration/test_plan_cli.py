"""train.py --plan and --overfit-one-batch as users call them."""

import re

import pytest
from PIL import Image

from tests.helpers.launching import python, succeed, torchrun
from tests.helpers.trainings import write_noise

GOLDEN = "tests/helpers/golden.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_noise(root)
    return root


def plan(*words, **options):
    return python("train.py", "--config", GOLDEN, "--plan", "--gpus", "4", "--gpu", "a100-40", *words, **options)


def test_a_plan_is_printed_and_nothing_is_written(data, tmp_path):
    words = ["--data_dir", data, f"output_dir={tmp_path}/runs", "activation_checkpointing=full"]
    text = succeed(plan(*words)).stdout
    for section in ("recipe", "memory", "speed", "data", "checkpoints"):
        assert f"\n{section}\n" in text
    assert "20 epochs run" in text  # of 32 images in batches of 32
    assert "32 images of" in text
    assert re.search(r"an image takes .* GFLOP to train .*, 1\.[23]\d times that with recomputing", text)
    for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        for mode in ("none", "selective", "blocks", "full"):
            row = re.search(rf"^  {engine} +{mode} +(.*)$", text, re.MULTILINE)
            assert row, (engine, mode)
            *kinds, whole, largest = (float(cell.replace(",", "")) for cell in row[1].split())
            assert len(kinds) == 6
            assert sum(kinds) == pytest.approx(whole, abs=0.04)  # each rounded
            assert largest >= 8
    assert re.search(r"^  shards or folders: \d+ for \d+ reader", text, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


def test_a_model_whose_drop_path_skips_images_is_planned_as_if_it_did_not():
    words = ["model.drop_path=0.3", "--gpu", "l4"]
    plain, skipping = (succeed(plan(*words, f"model.drop_path_skips={skips}")).stdout for skips in ("false", "true"))
    assert "skips images takes less than is predicted here" in skipping
    tables = [re.findall(r"^  (?:ddp|fsdp|zero).*$", text, re.MULTILINE) for text in (plain, skipping)]
    assert tables[0] == tables[1] != []


def test_a_plan_that_does_not_fit_names_one_that_does():
    """The hint is words for the command line."""
    huge = ["--gpu", "l4", "model.overrides={}", "model.img_size=224", "model.name=gc_vit_xxtiny", "ema=null"]
    huge += ["global_batch_size=4096"]
    refused = plan(*huge)
    assert refused.returncode == 2
    assert "error: the training does not fit on 4 x l4" in refused.stderr
    hint = re.search(r"hint: (.*), which takes", refused.stderr)
    assert hint, refused.stderr
    words = hint[1].split()
    assert words[-1].startswith("trainer.micro_batch_size=")
    assert "memory" in succeed(plan(*huge, *words)).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu", "h100-81"], "did you mean h100-80?"),
        (["--data_dir", "/nowhere"], "no directory: got /nowhere (missing); hint: check --data_dir, or"),
        (["engine=zero", "zero.extra={zero_optimization: {reduce_bucket_size: big}}"], "DeepSpeed refuses zero.extra"),
        (["engine=zero", "zero.extra={zero_optimization: {reduce_bucket_sizes: 5}}"], "DeepSpeed refuses zero.extra"),
        (["engine=fsdp", "fsdp.shard_size=3"], "hint: set fsdp.shard_size=2, or null"),
        (["model.num_classes=5", "--data_dir", "DATA"], "another number of classes"),
    ],
)
def test_what_cannot_be_planned(data, words, told):
    done = plan(*[str(data) if word == "DATA" else word for word in words])
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def overfit(*words):
    return python("train.py", "--config", GOLDEN, "--overfit-one-batch", "augment.mix=null", *words)


def test_noise_with_labels_of_its_own_is_learned_by_heart(data, tmp_path):
    done = succeed(overfit("--data_dir", data, f"output_dir={tmp_path}"))
    losses = [float(x) for x in re.findall(r"updates: loss ([\d.]+)", done.stdout)]
    assert len(losses) >= 2
    assert losses[-1] < losses[0] / 2
    assert "\nLEARNED: " in done.stdout
    assert "top-1 100 %" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_images_that_tell_nothing_of_their_labels_are_not_learned(tmp_path):
    """All are black, of four classes: the most likely outcome of pointing at the wrong folder."""
    for split in ("train", "val"):
        for label in range(4):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (36, 36)).save(tmp_path / split / str(label) / f"{i}.png")
    done = overfit("--data_dir", tmp_path, "augment.erase_prob=0")
    assert done.returncode == 1
    assert "NOT LEARNED: in " in done.stderr
    assert "Traceback" not in done.stderr


def test_what_shards_or_skips_is_learned_by_one_process_too(data):
    done = succeed(overfit("--data_dir", data, "engine=fsdp", "fsdp.shard_size=8", "model.drop_path_skips=true"))
    assert "\nLEARNED: " in done.stdout


@pytest.mark.dist
def test_one_batch_is_for_one_process(data):
    words = ["train.py", "--config", GOLDEN, "--overfit-one-batch", "--data_dir", data]
    done = torchrun(2, *words)
    assert done.returncode != 0
    assert "--overfit-one-batch is for one process" in done.stderr
