"""The scaling model against the engines' measured traffic, against itself, its benchmark and its page."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.engines_bytes import traffic_in_theory
from benchmarks.engines_crew import SHARDS_OF_HSDP
from gcvit.planning.collectives import GPU_LINKS, Group, Links, Message, collective_seconds
from gcvit.planning.scaling import (
    ENGINES,
    Part,
    Profile,
    Setup,
    can_shard,
    fill_buckets,
    find_obstacle,
    predict_scaling,
    profile_variant,
    simulate_step,
)
from tests.helpers.launching import ROOT as REPOSITORY

LINKS = Links(nvlink=100e9, network=10e9, post=1e-6, memory=1e12)
FREE = Links(nvlink=1e30, network=1e30, post=0.0, memory=1e30)
LAYER = Part(((64, 1024), (1024, 64)), 1e9)
ROOT = Part(((64,), (1000, 64)), 5e8)
PROFILE = Profile((LAYER,) * 6 + (ROOT,), (2, 2, 2), 100)


@pytest.fixture(scope="module")
def xxtiny() -> Profile:
    return profile_variant("gc_vit_xxtiny")


# What `benchmarks.engines --only traffic` counted on 2 real processes in fp32 (benchmarks/RESULTS.md). DeepSpeed was
# seen to keep some parts from forward to backward, and so to gather 32 times where all would be 42.
COUNTED = {
    "ddp": {"all_reduce": 3},
    "fsdp": {"all_gather": 5, "reduce_scatter": 3},
    "zero2": {"all_reduce": 12, "all_gather": 2},
    "zero3": {"all_gather": 42, "reduce_scatter": 11, "all_reduce": 2},
}


@pytest.mark.parametrize("engine", COUNTED)
def test_messages_are_those_that_the_engines_were_seen_to_send(engine: str, xxtiny: Profile) -> None:
    step = simulate_step(engine, xxtiny, Setup(2, 1.0, reshard=True, weight_bytes=4), LINKS)
    assert Counter(message.kind for message in step.messages) == COUNTED[engine]


@pytest.mark.parametrize("num_micro_steps", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_are_those_of_the_engines_theory(engine: str, num_micro_steps: int, xxtiny: Profile) -> None:
    links = replace(LINKS, gpus_per_node=SHARDS_OF_HSDP)
    setup = Setup(2 * SHARDS_OF_HSDP, 1.0, num_micro_steps, reshard=True, weight_bytes=4)
    last = sum(part.num_parameters for part in xxtiny.parts[-1 - xxtiny.units[-1] :])  # with the root
    theory = traffic_in_theory(engine, 4 * xxtiny.num_parameters, setup.num_gpus, num_micro_steps, kept=4 * last)
    assert simulate_step(engine, xxtiny, setup, links).sent == pytest.approx(theory, rel=0.01)  # rows are filled up


def test_what_is_kept_is_not_gathered_again() -> None:
    sent = simulate_step("fsdp", PROFILE, Setup(2, 1.0, 3, weight_bytes=4), LINKS).sent
    weights = 4 * PROFILE.num_parameters
    assert sent == pytest.approx(traffic_in_theory("fsdp", weights, 2, 3, kept=weights), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_of_one_unit_can_be_simulated(engine: str) -> None:
    """A tiny model is gathered in one piece, with no next unit to prefetch."""
    step = simulate_step(engine, Profile((LAYER, ROOT), (1,), 100), Setup(2, 1.0), LINKS)
    assert step.seconds > 0


def test_the_model_is_counted_whole(xxtiny: Profile) -> None:
    assert xxtiny.num_parameters == 11_995_428
    assert xxtiny.flops == pytest.approx(2 * 2.121e9, rel=1e-3)
    assert sum(xxtiny.units) == len(xxtiny.parts) - 1
    assert xxtiny.num_operations > 500


@pytest.mark.parametrize("engine", ENGINES)
def test_without_links_only_computing_takes_time(engine: str) -> None:
    for num_micro_steps in (1, 2):
        setup = Setup(64, 0.1, num_micro_steps)
        calls = 40e-6 * 64 * 200  # NCCL's own latencies remain
        assert (
            0.1 * num_micro_steps <= simulate_step(engine, PROFILE, setup, FREE).seconds < 0.1 * num_micro_steps + calls
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_slower_networks_and_more_nodes_never_help(engine: str) -> None:
    fast, slow = (
        [simulate_step(engine, PROFILE, Setup(n, 1e-3), replace(LINKS, network=rate)).seconds for n in (8, 32, 256)]
        for rate in (10e9, 1e9)
    )
    assert fast == sorted(fast)
    assert fast[0] == slow[0]  # one node has no network
    assert all(a < b for a, b in zip(fast[1:], slow[1:], strict=True))


def test_ddp_hides_all_but_its_last_bucket() -> None:
    setup = Setup(16, 1.0, buckets=(4 * LAYER.num_parameters,) * 2, update_bytes=0)
    step = simulate_step("ddp", PROFILE, setup, LINKS)
    assert step.seconds == pytest.approx(1.0 + collective_seconds(step.messages[-1], LINKS))
    assert len(step.messages) == 6


def test_fsdp_exposes_its_first_gathers_and_its_last_scatters() -> None:
    step = simulate_step("fsdp", PROFILE, Setup(16, 1.0, update_bytes=0), LINKS)
    gathers, scatters = (
        [collective_seconds(m, LINKS) for m in step.messages if m.kind == kind]
        for kind in ("all_gather", "reduce_scatter")
    )
    exposed = gathers[0] + gathers[1] + scatters[-2] + scatters[-1] + gathers[-1]  # the last one is of norms
    assert step.seconds == pytest.approx(1.0 + exposed)


def test_buckets_fill_as_each_engine_fills_them() -> None:
    assert fill_buckets([[3, 3], [3, 3]], limit=5, first=2) == [[3], [6, 3]]  # reached
    assert fill_buckets([[3, 3], [3, 9]], limit=6) == [[], [6, 3, 9]]  # not exceeded, but by one alone


def test_collectives_reach_the_slower_link_and_pay_for_their_hops() -> None:
    node, nodes = Group(1, 8), Group(4, 8)
    huge = 10**12
    assert collective_seconds(Message("all_gather", huge, node), LINKS) == pytest.approx(7 / 8 * huge / 100e9, rel=1e-3)
    across = collective_seconds(Message("all_gather", huge, nodes), LINKS)
    assert across == pytest.approx(31 / 32 * huge / 80e9, rel=1e-3)  # eight rings of 10 GB/s each
    one_each = collective_seconds(Message("reduce_scatter", huge, Group(4, 1)), LINKS)
    assert one_each == pytest.approx(3 / 4 * huge / 10e9, rel=1e-3)
    assert collective_seconds(Message("all_reduce", huge, Group(1, 1)), LINKS) == 0
    small = [
        [collective_seconds(Message(kind, 8, Group(n, 8)), LINKS) for n in (16, 128)]
        for kind in ("all_reduce", "all_gather")
    ]
    assert small[0][1] < 2 * small[0][0]  # a tree
    assert small[1][1] > 7 * small[1][0]  # a ring


def test_rows_decide_over_how_many_ranks_fsdp_goes() -> None:
    wide = Profile((Part(((9, 1000),), 1.0),), (), 0)
    assert can_shard(wide, 9)
    assert can_shard(wide, 3)
    assert not can_shard(wide, 8)  # five of them would have two rows, or one, and three nothing


def test_the_published_speed_up_is_met_and_can_be_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, misses = scaling.check_published()
    assert misses == []
    for preset, rates in scaling.NEMO_IMAGES.items():
        assert found["nemo"][preset]["64 a GPU"][0] == 1
        assert found["nemo"][preset]["measured"][-1] == rates[-1] / rates[0]
    assert "NeMo" in capsys.readouterr().out
    slow = replace(scaling.PRESETS["a100"], network=1e9)
    monkeypatch.setitem(scaling.PRESETS, "a100", slow)
    assert len(scaling.check_published()[1]) == 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["scaling", *arguments])
    with pytest.raises(SystemExit) as exit_:
        scaling.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_tables_say_that_the_speed_is_assumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    narrow = replace(PROFILE, parts=(Part(((64, 1024),), 1e9),) * 6 + (ROOT,))
    monkeypatch.setattr(scaling, "profile_variant", lambda variant: narrow)
    assert run(monkeypatch, "--quick", "--check", "--json", str(tmp_path / "found.json")) == 0
    printed = capsys.readouterr().out
    titles = [line for line in printed.splitlines() if line.startswith("gc_vit_base, ")]
    assert len(titles) == 3
    assert all("ASSUMED: MFU 0.3" in title for title in titles)
    assert "refused" in printed  # 1000 rows at most do not go over 1024 GPUs
    found = json.loads((tmp_path / "found.json").read_text())["models"]["gc_vit_base"]
    for rows in found["steps"].values():
        assert [row["gpus"] for row in rows] == [8, 64, 1024]
        assert all(0 < e["efficiency"] <= 1 for row in rows for e in row["engines"].values())


def test_a_measured_speed_is_taken_and_a_cpus_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    training = {
        "sdpa": {"images_per_s": 300.0, "num_kernels": 900},
        "triton compiled": {"images_per_s": 700.0, "num_kernels": 400},
        "timm compiled": {"images_per_s": 800.0, "num_kernels": 500},
    }
    contest = {"variant": "gc_vit_base", "modes": {"training": training}}
    path = tmp_path / "model.json"
    monkeypatch.setattr(scaling, "profile_variant", lambda variant: PROFILE)
    path.write_text(json.dumps({"device": "H100", "contests": [contest]}))
    assert run(monkeypatch, "--quick", "--model-json", str(path)) == 0
    assert "gc_vit_base, one GPU alone: 700 img/s, measured: triton compiled, H100" in capsys.readouterr().out
    path.write_text(json.dumps({"device": "CPU, 2 cores", "contests": [contest]}))
    assert run(monkeypatch, "--quick", "--model-json", str(path)) == 2
    assert "measured on a CPU" in capsys.readouterr().err


def test_what_a_gpu_cannot_hold_at_once_takes_micro_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--room", "128", "--operation-us", "10"])
    arguments = scaling.parse_arguments()
    speed = scaling.Speed(images_per_s=1000.0, num_operations=2000, source="")
    setup = scaling.make_setup(8, 512, speed, arguments)
    assert (setup.num_micro_steps, setup.micro_seconds) == (4, 0.128)
    setup = scaling.make_setup(8, 1, speed, arguments)
    assert (setup.num_micro_steps, setup.micro_seconds) == (1, pytest.approx(0.02))  # launching takes longer
    assert math.isclose(scaling.IMAGE_BYTES, 115_440, rel_tol=1e-3)


# ---- the plan and the page -----------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPU_LINKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_efficiency_is_1_for_one_gpu_and_falls_with_more(engine: str, gpu: str) -> None:
    scalings = [predict_scaling(engine, gpu, PROFILE, Setup(n, 0.02)) for n in (1, 2, 4, 8, 16, 64, 256)]
    efficiencies = [scaling.efficiency for scaling in scalings if scaling]
    assert efficiencies[0] == 1
    if engine == "ddp":  # the others update less on each GPU the more there are
        assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[3:] == sorted(efficiencies[3:], reverse=True)
    assert len(efficiencies) == 7
    assert efficiencies[-1] < 0.999


def test_slower_links_lower_the_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    def efficiency() -> float:
        scaling = predict_scaling("hsdp", "h100-80", PROFILE, Setup(64, 0.02))
        assert scaling
        return scaling.efficiency

    fast = efficiency()
    monkeypatch.setitem(GPU_LINKS, "h100-80", replace(GPU_LINKS["h100-80"], network=1e9))
    assert efficiency() < fast


@pytest.mark.parametrize(
    ("engine", "gpu", "num_gpus", "shard_size", "words"),
    [
        ("zero3+offload", "h100-80", 8, None, "no model of zero3"),
        ("ddp", "l4", 8, None, "no bandwidths known for l4"),
        ("ddp", "h100-80", 12, None, "do not fill nodes"),
        ("hsdp", "h100-80", 24, 6, "do not fill nodes"),
        ("hsdp", "h100-80", 24, 12, "do not fill nodes"),
    ],
)
def test_what_cannot_be_predicted_has_a_reason(
    engine: str, gpu: str, num_gpus: int, shard_size: int | None, words: str
) -> None:
    assert words in find_obstacle(engine, gpu, num_gpus, shard_size)
    assert predict_scaling(engine, gpu, PROFILE, Setup(num_gpus, 0.02, shard_size=shard_size)) is None


@pytest.mark.parametrize("shard_size", [2, 4, 8, 16])
def test_shards_of_hsdp_may_be_parts_of_nodes_or_several(shard_size: int) -> None:
    sent = simulate_step("hsdp", PROFILE, Setup(32, 0.02, shard_size=shard_size), LINKS).messages
    assert {m.group.size for m in sent if m.kind != "all_reduce"} == {shard_size}
    assert {m.group.size for m in sent if m.kind == "all_reduce"} == {32 // shard_size}


def test_the_page_has_the_predicted_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--models", "gc_vit_base") == 0
    page = (REPOSITORY / "docs/scaling.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(printed) > 60
    assert [line for line in printed if line not in page] == []


def test_a_plan_predicts_the_step_of_the_page() -> None:
    """GC ViT-B with ddp on 32 GPUs, 1024 images in all: 14.1 ms on the page."""
    profile = profile_variant("gc_vit_base")
    compute = 32 * 3 * profile.flops / (0.3 * 790e12)
    scaling = predict_scaling("ddp", "h100-80", profile, Setup(32, compute))
    assert scaling
    assert f"   32    1024{1e3 * scaling.seconds:8.1f} ms" in (REPOSITORY / "docs/scaling.md").read_text()
