"""The arithmetic of `benchmarks.scaling`, against the engines' measured traffic and against itself."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.engines_bytes import traffic_in_theory
from benchmarks.engines_crew import SHARDS_OF_HSDP
from benchmarks.scaling_model import (
    ENGINES,
    Group,
    Links,
    Message,
    Part,
    Profile,
    Setup,
    can_shard,
    collective_seconds,
    fill_buckets,
    play_step,
    profile_variant,
)

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
    step = play_step(engine, xxtiny, Setup(2, 1.0, reshard=True, weight_bytes=4), LINKS)
    assert Counter(message.kind for message in step.messages) == COUNTED[engine]


@pytest.mark.parametrize("num_micro_steps", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_are_those_of_the_engines_theory(engine: str, num_micro_steps: int, xxtiny: Profile) -> None:
    links = replace(LINKS, gpus_per_node=SHARDS_OF_HSDP)
    setup = Setup(2 * SHARDS_OF_HSDP, 1.0, num_micro_steps, reshard=True, weight_bytes=4)
    last = sum(part.num_parameters for part in xxtiny.parts[-1 - xxtiny.units[-1] :])  # with the root
    theory = traffic_in_theory(engine, 4 * xxtiny.num_parameters, setup.num_gpus, num_micro_steps, kept=4 * last)
    assert play_step(engine, xxtiny, setup, links).sent == pytest.approx(theory, rel=0.01)  # rows are filled up


def test_what_is_kept_is_not_gathered_again() -> None:
    sent = play_step("fsdp", PROFILE, Setup(2, 1.0, 3, weight_bytes=4), LINKS).sent
    weights = 4 * PROFILE.num_parameters
    assert sent == pytest.approx(traffic_in_theory("fsdp", weights, 2, 3, kept=weights), rel=1e-4)


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
        assert 0.1 * num_micro_steps <= play_step(engine, PROFILE, setup, FREE).seconds < 0.1 * num_micro_steps + calls


@pytest.mark.parametrize("engine", ENGINES)
def test_slower_networks_and_more_nodes_never_help(engine: str) -> None:
    fast, slow = (
        [play_step(engine, PROFILE, Setup(n, 1e-3), replace(LINKS, network=rate)).seconds for n in (8, 32, 256)]
        for rate in (10e9, 1e9)
    )
    assert fast == sorted(fast)
    assert fast[0] == slow[0]  # one node has no network
    assert all(a < b for a, b in zip(fast[1:], slow[1:], strict=True))


def test_ddp_hides_all_but_its_last_bucket() -> None:
    setup = Setup(16, 1.0, buckets=(4 * LAYER.num_parameters,) * 2, update_bytes=0)
    step = play_step("ddp", PROFILE, setup, LINKS)
    assert step.seconds == pytest.approx(1.0 + collective_seconds(step.messages[-1], LINKS))
    assert len(step.messages) == 6


def test_fsdp_exposes_its_first_gathers_and_its_last_scatters() -> None:
    step = play_step("fsdp", PROFILE, Setup(16, 1.0, update_bytes=0), LINKS)
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
