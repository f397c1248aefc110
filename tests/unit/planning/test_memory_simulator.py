"""What engines hold, in closed form, and what a step adds to it; `benchmarks/plan.py` compares with trainings."""

import pytest
import torch

from gcvit.config.load import load_config
from gcvit.config.schema import FsdpConfig, ZeroConfig
from gcvit.data.batch_plan import BatchPlan
from gcvit.model.from_config import build_model
from gcvit.planning.memory_predictor import simulator_of, with_engine
from gcvit.planning.memory_simulator import KINDS, Layout, Memory
from tests.helpers.imagined import imagine
from tests.helpers.launching import ROOT

CONFIG = load_config(ROOT / "tests/helpers/golden.yaml", ["global_batch_size=64"])[0]
WORLD = 4
with torch.device("meta"):
    MODEL = build_model(CONFIG.model)
LAYOUT = Layout(MODEL)
N = LAYOUT.num_parameters


def predict(engine: str, num_images: int = 16, world_size: int = WORLD, **changes) -> Memory:
    config = with_engine(CONFIG, engine).model_copy(update=changes)
    micro_steps = BatchPlan.from_config(config, world_size, num_images).num_micro_steps
    return simulator_of(config)(config, LAYOUT, world_size, micro_steps, False).simulate(imagine(MODEL, num_images))


@pytest.mark.parametrize(
    ("engine", "parameters", "gradients", "moments"),
    [
        ("ddp", 4 * N, 4 * N, 8 * N),
        ("fsdp", N, 0, 2 * N),
        ("zero1", 4 * N + N, 0, 2 * N),
        ("zero2", 4 * N + N, 0, 2 * N),
        ("zero3", N + N, N, 2 * N),
    ],
)
def test_what_is_held_between_steps(engine, parameters, gradients, moments):
    """fp32 on four ranks: bytes of N parameters of 4; shards are filled up by a few percent of this tiny model."""
    held = predict(engine).held
    assert set(held) <= set(KINDS)
    wanted = {"parameters": parameters, "gradients": gradients, "moments": moments, "ema": moments / 2}
    for kind, num_bytes in wanted.items():
        assert num_bytes <= held.get(kind, 0) <= 1.06 * num_bytes, kind


def test_no_ema_is_no_memory():
    with_ema, without = predict("ddp"), predict("ddp", ema=None)
    assert with_ema.peak - without.peak == with_ema.held["ema"] == 4 * N
    assert without.held["ema"] == 0


def test_the_peak_is_all_that_is_there_then_and_more_than_is_held():
    for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        memory = predict(engine)
        assert memory.peak == sum(memory.at_peak.values()) > sum(memory.held.values()), engine
        assert min(memory.at_peak.values()) >= 0, engine
        assert memory.moment in ("forward", "backward", "update")


def test_fsdp_sums_whole_gradients_over_micro_steps():
    """It exchanges them in the last one only."""
    alone, accumulated = (predict("fsdp", 8, global_batch_size=8 * WORLD * n).at_peak for n in (1, 2))
    more = accumulated.get("gradients", 0) - alone.get("gradients", 0)
    assert 0.5 * 4 * N < more <= 1.05 * 4 * N


def test_zero2_sums_shares_and_zero1_whole_gradients():
    peaks = {
        engine: predict(engine, 8, global_batch_size=16 * WORLD).at_peak["gradients"] for engine in ("zero1", "zero2")
    }
    assert peaks["zero1"] >= 4 * N
    assert peaks["zero2"] < 0.75 * peaks["zero1"]


def test_keeping_what_was_gathered_takes_more():
    reshards, keeps = (
        predict("fsdp", fsdp=FsdpConfig(reshard_after_forward=x, unit_parameters=10_000)) for x in (True, False)
    )
    assert keeps.at_peak["gathered"] > 1.2 * reshards.at_peak["gathered"]


@pytest.mark.parametrize(
    ("engine", "changes", "on_host"),
    [
        ("fsdp", {"fsdp": FsdpConfig(cpu_offload=True)}, 5 * N),
        ("zero2", {"zero": ZeroConfig(stage=2, offload_optimizer="cpu")}, 5 * N),
        ("zero3", {"zero": ZeroConfig(stage=3, offload_optimizer="cpu", offload_parameters="cpu")}, 6 * N),
    ],
)
def test_what_is_offloaded_is_on_the_host(engine, changes, on_host):
    memory, plain = predict(engine, **changes), predict(engine)
    assert on_host <= memory.host <= 1.06 * on_host
    assert plain.host == 0
    assert memory.held.get("moments", 0) == memory.held.get("ema", 0) == 0
    assert memory.peak < plain.peak


def test_replicas_of_shards_hold_what_a_shard_group_holds():
    assert predict("fsdp", fsdp=FsdpConfig(shard_size=2)).held == predict("fsdp", world_size=2).held
