"""The record of a step on tensors without memory, against that of real ones; and a forecast, against records."""

import pytest
import torch

from gcvit.config.load import load_config
from gcvit.model import create_model
from gcvit.parallel.activation_checkpointing import recompute_parts
from gcvit.planning import memory_predictor, step_trace
from gcvit.planning.memory_predictor import Forecast, with_engine
from gcvit.planning.step_trace import Event, Recorder, compute_as_on_gpu, record_step
from tests.helpers.launching import ROOT

TINY = {"width": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "windows": (4, 2, 2, 1)}


def build(device="meta", mode="none"):
    with torch.device(device):
        model = create_model("gc_vit_xxtiny", num_classes=10, img_size=32, drop_path_rate=0.2, **TINY)
    recompute_parts(model, mode)
    return model


def record(mode="none", *, num_images=4, dtype=torch.float32, autocast=False, on_gpu=False) -> list[Event]:
    model = build(mode=mode)
    if on_gpu:
        compute_as_on_gpu(model, runs_triton=True)
    return record_step(model, num_images=num_images, dtype=dtype, autocast=autocast)


def peak_of(events: list[Event]) -> int:
    total = peak = 0
    for event in events:
        total += event.num_bytes
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("mode", ["none", "selective", "blocks", "full"])
def test_tensors_without_memory_give_the_record_of_real_ones(mode):
    """The same events in the same order."""
    model = build("cpu", mode).train()
    recorder = Recorder({p.untyped_storage()._cdata for p in model.parameters()})
    step_trace.watch(model, recorder)
    with recorder:
        step_trace.run_step(model, recorder, 4, torch.float32, autocast=False)
    assert recorder.events == record(mode)


def test_all_is_freed_and_every_gradient_comes_once():
    model, events = build(), record(num_images=2)
    assert sum(event.num_bytes for event in events) == 0
    names = [event.name for event in events if event.what == "gradient"]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_parts_are_passed_forward_and_then_backward():
    parts, events = build().cut_points(), record(num_images=2)
    names = {what: [e.name for e in events if e.what == what and e.name] for what in ("forward", "forwarded")}
    assert names == {"forward": parts, "forwarded": parts}
    for what in ("backward", "backwarded"):
        passed = [e.name for e in events if e.what == what and e.name]
        # The stem's images have no gradient; a query generator is done with when all blocks that ask it are.
        assert sorted(passed) == sorted(set(parts) - ({"stem"} if what == "backwarded" else set()))
        assert [n for n in passed if ".blocks." in n] == [n for n in reversed(parts) if ".blocks." in n]


def test_recomputing_takes_less_and_more_images_take_more():
    peaks = {mode: peak_of(record(mode)) for mode in ("none", "blocks", "full")}
    assert peaks["none"] > 1.2 * peaks["blocks"] > 1.2 * peaks["full"]
    assert peak_of(record("none", num_images=8)) > 1.7 * peaks["none"]


def test_autocast_keeps_casts_of_weights_and_on_a_gpu_norms_in_fp32():
    bf16, cast = (peak_of(record(dtype=torch.bfloat16, autocast=autocast)) for autocast in (False, True))
    assert cast > 1.1 * bf16
    assert peak_of(record(dtype=torch.bfloat16, autocast=True, on_gpu=True)) != cast


@pytest.mark.parametrize(("engine", "mode", "num_images"), [("ddp", "none", 13), ("zero3", "full", 40)])
def test_a_forecast_is_what_a_record_of_that_micro_batch_gives(monkeypatch, engine, mode, num_images):
    """Between and beyond the two that are recorded."""
    config = load_config(ROOT / "tests/helpers/golden.yaml", ["global_batch_size=160"])[0]
    config = with_engine(config, engine).model_copy(update={"activation_checkpointing": mode})
    found = Forecast(config, on_gpu=False).predict(config, 4, num_images)
    monkeypatch.setattr(memory_predictor, "_RECORDED", (num_images, num_images + 1))
    wanted = Forecast(config, on_gpu=False).predict(config, 4, num_images)
    assert found.peak == pytest.approx(wanted.peak, rel=1e-3)
    assert found.moment == wanted.moment
