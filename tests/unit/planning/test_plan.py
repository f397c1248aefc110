"""A plan: what is refused, what is proposed instead and that it works, and the arithmetic of its sentences.

Records of steps are imagined here, so that a plan takes no time; `tests/integration/test_plan_cli.py` makes real ones.
"""

import re
import shlex
from dataclasses import replace

import pytest

from gcvit.config.load import load_config
from gcvit.errors import UserError
from gcvit.model.attention import WindowAttention
from gcvit.planning import format_plan as plan_text
from gcvit.planning import memory_predictor
from gcvit.planning.format_plan import describe
from gcvit.planning.memory_predictor import MODES, Forecast
from gcvit.planning.memory_simulator import KINDS
from gcvit.planning.plan import ROOM, Cell, Data, Plan, compare, make_plan
from gcvit.planning.scaling import Part, Profile
from gcvit.runtime.gpu_specs import DEVICES
from tests.helpers.imagined import imagine
from tests.helpers.launching import ROOT

GOLDEN = ROOT / "tests/helpers/golden.yaml"
FORWARD_FLOPS = 65_110_000_000
RECOMPUTING = {"none": 1.0, "selective": 1.1, "blocks": 1.3, "full": 1.3}
IMAGE_BYTES = {"none": 60e6, "selective": 30e6, "blocks": 20e6, "full": 10e6}  # that each of 16 parts keeps


@pytest.fixture(autouse=True)
def imagined_steps(monkeypatch):
    """Steps whose activations are IMAGE_BYTES, and no table of engines: it takes longest."""
    monkeypatch.setattr(Forecast, "recomputing", lambda forecast, config, _: (forecast.model, config))

    def record(model_and_config, *, num_images, dtype, autocast):
        model, config = model_and_config
        kept = IMAGE_BYTES[config.activation_checkpointing] / len(model.cut_points())
        return imagine(model, num_images, round(kept))

    monkeypatch.setattr(memory_predictor, "record_step", record)
    monkeypatch.setattr("gcvit.planning.plan.compare", lambda *_: ())
    monkeypatch.setattr("gcvit.planning.plan.count_forward_flops", lambda *_: FORWARD_FLOPS)
    profile = Profile((Part(((1024, 1024),), FORWARD_FLOPS / 12),) * 12, (3, 4, 4), 1000)
    monkeypatch.setattr("gcvit.planning.plan.profile_config", lambda _: profile)
    monkeypatch.setattr(
        "gcvit.planning.plan.count_recomputing", lambda config, *_: RECOMPUTING[config.activation_checkpointing]
    )


def plan(*overrides: str, num_gpus: int = 4, gpu: str = "a100-40", **options) -> Plan:
    return make_plan(load_config(GOLDEN, list(overrides))[0], num_gpus=num_gpus, gpu=gpu, **options)


def refusal(*overrides: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        plan(*overrides, **options)
    return str(caught.value)


def proposed(text: str) -> list[str]:
    """The overrides of a hint."""
    return shlex.split(text.partition("hint: ")[2].partition(", which takes")[0]) if ", which takes" in text else []


def test_every_engine_and_mode_is_compared():
    config = load_config(GOLDEN, ["global_batch_size=64"])[0]
    found = list(compare(config, Forecast(config, on_gpu=True), 4, 16, 36e9))
    engines = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    assert [(cell.engine, cell.mode) for cell in found] == [(e, m) for e in engines for m in MODES]
    for engine in engines:
        peaks = [cell.memory.peak for cell in found if cell.engine == engine]
        assert peaks == sorted(peaks, reverse=True), engine
        most = [cell.largest for cell in found if cell.engine == engine]
        assert most == sorted(most), engine


def test_an_engine_that_cannot_be_had_is_left_out(monkeypatch):
    """Too few rows for shards over 512 ranks; within nodes of 8 there are enough. Compiling leaves no stage 3."""
    monkeypatch.setattr(Forecast, "largest", lambda *_: 0)
    for overrides, wanted in (
        (["engine=zero", "zero.stage=3"], ["zero3", "ddp", "hsdp", "zero1", "zero2"]),
        (["compile=true"], ["ddp", "hsdp", "zero1", "zero2"]),
    ):
        config = load_config(GOLDEN, ["global_batch_size=1024", *overrides])[0]
        cells = compare(config, Forecast(config, on_gpu=True), 512, 2, 36e9)
        assert list(dict.fromkeys(cell.engine for cell in cells)) == wanted


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        # 640 images of 60 MB: 600 of them in 36 GB, without accumulating; 320 twice.
        (["global_batch_size=2560"], "trainer.micro_batch_size=320"),
        (["global_batch_size=2560", "engine=fsdp"], "trainer.micro_batch_size=320"),
        (["global_batch_size=2560", "trainer.micro_batch_size=610"], "trainer.micro_batch_size=320"),
    ],
)
def test_a_smaller_micro_batch_is_proposed_first(overrides, wanted):
    text = refusal(*overrides)
    assert "does not fit on 4 x a100-40" in text
    assert proposed(text) == [wanted]


@pytest.mark.parametrize(
    ("bytes_per_image", "overrides", "wanted"),
    [
        # Fewer than 8 images fit: more recomputing, as little as does it.
        (8e9, [], ["activation_checkpointing=selective", "trainer.micro_batch_size=8"]),
        (18e9, ["engine=fsdp"], ["activation_checkpointing=full", "trainer.micro_batch_size=8"]),
        (8e9, ["activation_checkpointing=blocks"], ["trainer.micro_batch_size=8"]),
        # Then what fits at all, by the smallest change.
        (28e9, [], ["activation_checkpointing=selective", "trainer.micro_batch_size=2"]),
    ],
)
def test_what_is_proposed_is_the_nearest_and_works(monkeypatch, bytes_per_image, overrides, wanted):
    for mode, share in (("none", 1), ("selective", 1 / 2), ("blocks", 1 / 3), ("full", 1 / 6)):
        monkeypatch.setitem(IMAGE_BYTES, mode, bytes_per_image * share)
    overrides = ["global_batch_size=64", *overrides]
    words = proposed(refusal(*overrides))
    assert words == wanted
    assert plan(*overrides, *words).memory.peak <= ROOM * 40e9


def test_another_engine_is_proposed_with_what_must_go(monkeypatch):
    """On a GPU that has not the room for the states, they have to be cut."""
    for mode in MODES:
        monkeypatch.setitem(IMAGE_BYTES, mode, 1e3)
    num_parameters = plan().num_parameters
    monkeypatch.setattr(
        "gcvit.planning.plan.ROOM", 14 * num_parameters / 40e9
    )  # of 20 bytes a parameter, with gradients
    words = proposed(refusal())
    assert words[0] == "engine=fsdp"
    assert plan(*words).config.engine == "fsdp"
    words = proposed(refusal("engine=zero", "zero.stage=1", num_gpus=1))
    assert words == []


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["engine=zero", "zero.stage=1"], ["zero=null", "zero.stage=3"]),  # without accumulation 2 takes as much
        (["engine=zero", "zero.stage=2"], ["zero=null", "zero.stage=3"]),
        (["engine=fsdp", "fsdp.shard_size=2"], ["fsdp=null"]),
    ],
)
def test_the_same_engine_otherwise_is_nearer_than_another(monkeypatch, overrides, wanted):
    """On GPUs whose room is between what the two take."""
    for mode in MODES:
        monkeypatch.setitem(IMAGE_BYTES, mode, 1e3)
    room = (plan(*overrides).memory.peak + plan(*overrides, *wanted).memory.peak) / 2
    monkeypatch.setattr("gcvit.planning.plan.ROOM", room / 40e9)
    words = proposed(refusal(*overrides))
    assert words[:-1] == wanted
    assert plan(*overrides, *words).memory.peak <= room


def test_where_nothing_fits_larger_gpus_are_named(monkeypatch):
    for mode in MODES:
        monkeypatch.setitem(IMAGE_BYTES, mode, 1e12)
    assert "take more GPUs, or larger ones: without offloading nothing fits these" in refusal()


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["precision=bf16"], {"gpu": "v100-32"}, ["v100-32 does not compute in bf16", "precision=fp16"]),
        (["engine=fsdp", "fsdp.shard_size=3"], {}, ["fsdp.shard_size does not divide"]),
        (["engine=fsdp"], {"num_gpus": 4096}, ["too few for all processes"]),
        (["schedule.cosine=1 samples"], {}, ["shorter than one step"]),
        ([], {"gpu": "h100"}, ["unknown GPU", "did you mean h100-"]),
        ([], {"num_gpus": 0}, ["--gpus 0"]),
        ([], {"mfu": 30.0}, ["--mfu 30"]),
        (["zero.extra={no: 1}", "engine=zero"], {}, ["zero.extra has a key"]),
    ],
)
def test_what_cannot_work_is_refused(overrides, options, words):
    text = refusal(*overrides, **options)
    for word in words:
        assert word in text


def test_auto_becomes_the_largest_that_fits_split_evenly():
    found = plan("global_batch_size=2560", "trainer.micro_batch_size=auto")
    assert (found.batch_plan.capacity, found.batch_plan.num_micro_steps) == (320, 2)
    assert plan("global_batch_size=64", "trainer.micro_batch_size=auto").batch_plan.capacity == 16


def test_time_follows_from_operations_and_the_assumed_share_of_the_peak():
    found = plan("precision=bf16", num_gpus=4, mfu=0.25)
    assert found.images_per_second == pytest.approx(4 * 0.25 * 312e12 / (3 * FORWARD_FLOPS))
    # 20 updates of 32; evaluated twice, by weights and EMA, on 50,000 images at a third of the cost.
    images = 20 * 32 + 2 * 2 * 50_000 / 3
    assert found.hours == pytest.approx(images / found.images_per_second / 3600)
    assert plan("precision=bf16", num_gpus=8, mfu=0.25).hours == pytest.approx(found.hours / 2)
    slower = plan("precision=bf16", "activation_checkpointing=full", mfu=0.25)
    assert slower.recomputing == 1.3
    assert slower.images_per_second == pytest.approx(found.images_per_second / slower.recomputing)


@pytest.mark.parametrize(
    ("overrides", "num_gpus", "gpu", "words"),
    [
        (["engine=fsdp"], 16, "h100-80", ["on 16 GPUs, 2 node(s)", "NVLink 370 GB/s, network 47 GB/s", "not measured"]),
        (["engine=zero", "zero.stage=1"], 4, "a100-40", ["on 4 GPUs, 1 node(s)", "assumed: NVLink 235 GB/s, see"]),
        ([], 2, "l4", ["not predicted: no bandwidths known for l4"]),
        (["engine=fsdp", "fsdp.cpu_offload=true"], 2, "h100-80", ["not predicted: no model of fsdp+offload"]),
    ],
)
def test_scaling_is_predicted_or_the_obstacle_named(overrides, num_gpus, gpu, words):
    found = plan("precision=bf16", *overrides, num_gpus=num_gpus, gpu=gpu)
    text = "\n".join(plan_text.describe_speed(found))
    for word in words:
        assert word in text
    if found.scaling:
        assert 0.1 < found.scaling.efficiency < 1.1  # a GPU alone updates all that zero1 shards
        assert f"scaling efficiency {found.scaling.efficiency:.1%}" in text
        assert f"{found.scaling.efficiency * found.images_per_second:,.0f} images/s" in text


def test_one_gpu_has_no_scaling():
    assert "scaling" not in "\n".join(plan_text.describe_speed(plan(num_gpus=1)))


def test_gpus_without_images_add_no_speed():
    """Mixed images stay in pairs: of 8 there are four shares, and of 32 over five GPUs the largest is 8."""
    found = plan("global_batch_size=8", num_gpus=4)
    assert plan("global_batch_size=8", num_gpus=32).images_per_second == pytest.approx(found.images_per_second)
    assert plan(num_gpus=5).images_per_second == pytest.approx(4 * plan(num_gpus=1).images_per_second)


def test_a_gpu_too_old_for_our_kernels_is_planned_without_them():
    for gpu, path in (("v100-32", "sdpa"), ("a100-40", "triton")):
        forecast = Forecast(load_config(GOLDEN)[0], on_gpu=True, runs_triton=DEVICES[gpu].runs_triton)
        paths = {module.path for module in forecast.model.modules() if isinstance(module, WindowAttention)}
        assert paths == {path}, gpu


def test_a_checkpoint_has_parameters_moments_and_ema():
    found = plan()
    assert found.checkpoint_bytes == 16 * found.num_parameters
    assert plan("ema=null").checkpoint_bytes == 12 * found.num_parameters


def test_the_recipe_in_words():
    config = load_config(ROOT / "configs/gc_vit_large_fsdp.yaml")[0]
    text = describe(make_plan(config, num_gpus=32, gpu="h100-80"), ["a notice"])
    for words in (
        "320 epochs run (310 epochs of cosine, of which 20 epochs warm up, and 10 epochs of cooldown)",
        "400,364 updates of 1,024 images",
        "EMA half-life 2.8 epochs",
        "330 of 535 tensors without decay",
        "32 images a GPU and update, in 1 micro-step(s) of at most 32",
        "202.1 M parameters, bf16, by fsdp on 32 x h100-80",
        "an image takes 195.3 GFLOP to train",
        "3.23 GB each, every 1 epoch; 2 newest and the best: 9.70 GB",
        "1,024 lanes: whole ones for each GPU",
        "note: a notice",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert len(re.findall("note:", text)) == 1


def test_every_kind_of_memory_is_shown_for_every_engine():
    found = plan()
    kinds = dict(zip(KINDS, (1e9, 2e9, 3e9, 4e9, 5e9, 1234.5e9), strict=True))
    cell = Cell("zero3+offload", "selective", replace(found.memory, at_peak=kinds), 12_345)
    *_, heads, row = plan_text.describe_memory(replace(found, memory=cell.memory, cells=(cell,)))
    assert heads.split() == ["engine", "recomputing", *KINDS, "all", "would", "fit"]
    assert row.split()[:2] == ["zero3+offload", "selective"]
    assert row.split()[2:] == ["1.00", "2.00", "3.00", "4.00", "5.00", "1,234.50", "1,249.50", "12,345"]
    assert len(heads) == len(row) <= 118


def test_shards_are_set_against_their_readers():
    found = plan("data.num_workers=2", num_gpus=4)
    lines = {}
    for num_shards in (None, 7, 8):
        data = Data("here", 100, 10, 1e3, num_shards)
        lines[num_shards] = "\n".join(plan_text.describe_data(replace(found, data=data)))
    assert "shards: not known; from 8 on" in lines[None]
    assert "7 for 8 reader(s), readers share them" in lines[7]
    assert "8 for 8 reader(s), one or more of its own for each" in lines[8]


def test_what_would_go_badly_is_noted():
    well = ["precision=bf16", "data.num_workers=8", "data.lanes=16", "trainer.eval_every=20 steps"]

    def notes(*overrides, **options):
        return "\n".join(plan_text.find_warnings(plan(*well, *overrides, mfu=0.9, **options)))

    assert notes() == ""
    assert "5 GPUs do not divide data.lanes=16" in notes(num_gpus=5)
    assert "some have nothing to do" in notes(num_gpus=20)
    assert "the GPUs would wait" in notes("data.num_workers=0")
    assert "takes less than is predicted" in notes("compile=true")
    assert "GB of the host's memory" in notes("data.chunk_bytes=1000000000")
    assert "skips images takes less" in notes("model.drop_path_skips=true", "model.drop_path=0.1")
    found = plan(*well, "data.chunk_bytes=1000000000", mfu=0.9)
    assert not list(plan_text.find_warnings(replace(found, data=replace(found.data, is_chunked=False))))
