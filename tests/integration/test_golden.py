"""Golden runs: every engine on 1, 2 and 3 processes gives the losses of a plain loop in one process.

20 steps in fp32 at a global batch of 32, which 3 does not divide, with the real trainer on real files, against a loop
written with PyTorch's own parts. And the proof that the comparison finds a bug: three are put in.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit.checkpoint.store import open_checkpoint, read_tensors
from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.loader import train_stream
from gcvit.data.source import open_source
from gcvit.data.transforms import DeviceAugment
from gcvit.model.from_config import build_model
from gcvit.optim.lr_schedule import build_schedule
from tests.helpers.golden_runs import CASES, CONFIG, ENGINES, make_images, overrides, train_all

STEPS = 20
pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Run:
    """What a training left behind."""

    losses: np.ndarray
    norms: np.ndarray
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/ of four classes of noisy colours."""
    root = tmp_path_factory.mktemp("images")
    make_images(root)
    return root


def read_run(folder: Path) -> Run:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    last = open_checkpoint(folder / "checkpoints" / f"step_{train[-1]['step']:08d}")
    return Run(
        np.array([row["loss"] for row in train]),
        np.array([row["grad_norm"] for row in train]),
        {kind + "." + n: t for kind in ("model", "exp_avg", "ema") for n, t in read_tensors(last, kind).items()},
    )


def plain_run(config: Config, device: torch.device) -> Run:
    """The same training by PyTorch's own parts: one process, no engine, mean loss, `clip_grad_norm_`, plain AdamW."""
    torch.set_num_threads(1)
    source = open_source(config.data.dir, "train")
    model = build_model(config.model).train().to(device)
    model.init_weights(config.seed)
    no_decay = [n for n, p in model.named_parameters() if p.ndim == 1]
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for n, p in named.items() if n not in no_decay],
                "weight_decay": config.optim.weight_decay,
            },
            {"params": [named[n] for n in no_decay], "weight_decay": 0.0},
        ],
        betas=config.optim.betas,
        eps=config.optim.eps,
        foreach=False,
    )
    schedule = build_schedule(config.schedule, config.optim, global_batch_size=32, samples_per_epoch=source.num_samples)
    ema = {n: p.detach().clone() for n, p in named.items()}
    augment = DeviceAugment(config.augment, config.data, num_classes=4, seed=config.seed)
    batch_plan = BatchPlan.from_config(config, world_size=1, micro_batch_size=None)
    stream = train_stream(source, config, batch_plan, start_step=0, rank=0, pin_memory=False)
    losses, norms = [], []
    for step, (batch,) in zip(range(STEPS), stream, strict=False):
        x, y = augment(batch, step, device)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), config.optim.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        for n, p in named.items():
            ema[n].lerp_(p.detach(), 1 - 0.5 ** (1 / 5))
        losses.append(loss.item())
    tensors = {f"model.{n}": p.detach() for n, p in named.items()} | {f"ema.{n}": t for n, t in ema.items()}
    tensors |= {f"exp_avg.{n}": optimizer.state[p]["exp_avg"] for n, p in named.items()}
    return Run(np.array(losses), np.array(norms), {name: tensor.cpu() for name, tensor in tensors.items()})


def check_equal(got: Run, wanted: Run) -> str:
    """The bars: losses 1e-6 and norms 1e-5 at every step, final tensors 1e-5 in relative L2. Says how close it was."""
    np.testing.assert_allclose(got.losses, wanted.losses, rtol=1e-6)
    np.testing.assert_allclose(got.norms, wanted.norms, rtol=1e-5)
    assert got.weights.keys() == wanted.weights.keys()
    worst = 0.0
    # Some gradients are zero but for rounding, and their moments are noise: beside those of the whole model it is none.
    moments = [tensor.double() for name, tensor in wanted.weights.items() if name.startswith("exp_avg.")]
    noise = 1e-8 * sum(torch.linalg.vector_norm(moment) ** 2 for moment in moments) ** 0.5
    for name, tensor in wanted.weights.items():
        distance = torch.linalg.vector_norm((got.weights[name] - tensor).double())
        size = torch.linalg.vector_norm(tensor.double())
        bound = (1e-5 if name.startswith("model.") else 1e-4) * size
        if name.startswith("exp_avg."):
            bound = max(bound, noise)
        assert distance <= bound, f"{name}: {distance / size:.2e}"
        if name.startswith("model.") and size:
            worst = max(worst, float(distance / size))
    loss, norm = (np.abs(x / y - 1).max() for x, y in ((got.losses, wanted.losses), (got.norms, wanted.norms)))
    return f"largest differences: loss {loss:.1e}, norm {norm:.1e}, weights {worst:.1e}"


@pytest.fixture(scope="module")
def plain(images, device) -> dict[str, Run]:
    runs = {}
    for case in CASES:
        config, _ = load_config(CONFIG, [*CASES[case], f"data.dir={images}"])
        runs[case] = plain_run(config, device)
    return runs


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, "a"), marks=pytest.mark.gpu),
        (2, "abc"),
        (3, "a"),
        pytest.param((1, "bc"), marks=pytest.mark.slow),
        pytest.param((3, "bc"), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[1]}-on-{param[0]}",
)
def trained(request, images, device, tmp_path_factory) -> tuple[str, Path, bool]:
    """Train all engines on one number of ranks in some of the cases, and resume each engine from its step 10.

    Resumed runs are a third of the time. The quick tests resume on two ranks, the slow ones on one and three too.
    """
    (world_size, cases), out = request.param, tmp_path_factory.mktemp("golden")
    resumes = cases != "a" or device.type == "cuda"
    runs = []
    for engine, choose in ENGINES.items():
        runs += [{"tag": f"{engine}-{case}", "overrides": choose + overrides(case, world_size)} for case in cases]
        if not resumes:
            continue
        middle = out / f"{engine}-{cases[0]}" / "checkpoints" / "step_00000010"
        again = choose + overrides(cases[0], world_size)
        runs += [{"tag": f"{engine}-resumed", "overrides": again, "resume": str(middle)}]
    train_all(runs, world_size, images, out)
    return cases, out, resumes


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_as_a_plain_loop(engine, trained, plain):
    cases, out, _ = trained
    for case in cases:
        print(f"{engine}, case {case}:", check_equal(read_run(out / f"{engine}-{case}"), plain[case]))


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_equal_to_the_bit(engine, trained):
    cases, out, resumes = trained
    if not resumes:
        pytest.skip("resumed on two ranks; on one and three by the slow tests")
    whole, resumed = (read_run(out / f"{engine}-{kind}") for kind in (cases[0], "resumed"))
    assert resumed.losses.tolist() == whole.losses[10:].tolist()
    assert resumed.norms.tolist() == whole.norms[10:].tolist()
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name


def test_the_comparison_finds_bugs(images, plain, tmp_path):
    runs = [
        {"tag": "decay", "overrides": CASES["b"], "sabotage": "swapped decay groups"},
        {"tag": "gradient", "overrides": [], "sabotage": "doubled gradient"},
        {"tag": "clip", "overrides": ["optim.clip_norm=null"]},
        {"tag": "right", "overrides": []},
    ]
    train_all(runs, 1, images, tmp_path)
    check_equal(read_run(tmp_path / "right"), plain["a"])
    for tag, case in (("decay", "b"), ("gradient", "a"), ("clip", "a")):
        with pytest.raises(AssertionError):
            check_equal(read_run(tmp_path / tag), plain[case])
