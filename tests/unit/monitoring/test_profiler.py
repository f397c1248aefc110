"""A profile of some steps, in a world of one; of two ranks and the real training: tests/integration/test_live.py."""

import gzip
import json
import logging

import pytest
import torch

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.monitoring.profiler import Profiler, read_memory_use
from tests.helpers.launching import ROOT


def configure(tmp_path, profile: str) -> Config:
    path = ROOT / "tests/helpers/golden.yaml"
    return load_config(path, [f"output_dir={tmp_path}", f"trainer.profile={profile}"])[0]


def test_what_lies_between_its_steps_is_seen(tmp_path, world, caplog):
    caplog.set_level(logging.INFO, "gcvit")
    config = configure(tmp_path, "2:1")
    profiler = Profiler(config.trainer, config.run_dir / "profile", world, 10)
    for step in range(5):
        profiler.step(step)
        torch.ones(step + 2, 1000) @ torch.ones(1000, 1)
    profiler.close()
    folder = config.run_dir / "profile"
    names = ["memory_rank0.json", "operations_rank0.txt", "trace_rank0.json.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    events = json.loads(gzip.decompress((folder / "trace_rank0.json.gz").read_bytes()))["traceEvents"]
    shapes = [event["args"]["Input Dims"][0] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[4, 1000]]
    assert "aten::mm" in (folder / "operations_rank0.txt").read_text()
    memory = json.loads((folder / "memory_rank0.json").read_text())
    assert [time for time, _ in memory] == sorted(time for time, _ in memory)
    assert max(num_bytes for _, num_bytes in memory) - memory[0][1] >= 4000
    assert caplog.messages == [f"profile of steps 3 to 3: {folder}"]


def test_a_run_that_ends_within_it_leaves_what_there_is(tmp_path, world, caplog):
    caplog.set_level(logging.INFO, "gcvit")
    config = configure(tmp_path, "0:9")
    profiler = Profiler(config.trainer, config.run_dir / "profile", world, 2)
    for step in range(3):
        profiler.step(step)
    profiler.close()
    assert len(list((config.run_dir / "profile").iterdir())) == 3
    assert "profile of steps 1 to 2" in caplog.text


def test_nothing_is_seen_where_nothing_is_asked_for(tmp_path, world):
    for profile, steps in (("null", range(3)), ("1:2", range(4, 9))):  # a resume past the profile
        config = configure(tmp_path, profile)
        profiler = Profiler(config.trainer, config.run_dir / "profile", world, 10)
        for step in steps:
            profiler.step(step)
        profiler.close()
    assert not config.run_dir.exists()


def test_a_profile_past_the_end_is_refused(tmp_path, world):
    Profiler(configure(tmp_path, "9:5").trainer, tmp_path, world, 10)
    with pytest.raises(UserError, match="where the run has ended: got 10:5; expected: START below 10"):
        Profiler(configure(tmp_path, "10:5").trainer, tmp_path, world, 10)


@pytest.mark.parametrize("profile", ["20", "20:0", "-1:3", "a:b", "1:2:3", "20:"])
def test_what_is_no_profile_is_refused(profile, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.profile"):
        configure(tmp_path, f"'{profile}'")


def test_minutes_and_seconds_are_no_number(tmp_path):
    """As older YAML reads 20:30."""
    assert configure(tmp_path, "20:30").trainer.profiled_steps == (20, 50)


def test_memory_is_told_in_order(tmp_path):
    events = [{"name": "[memory]", "ts": ts, "args": {"Total Allocated": size}} for ts, size in ((30.5, 7), (10.0, 4))]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"name": "aten::mm"}, *events]}).encode()))
    assert read_memory_use(path) == [(0.0, 4), (20.5, 7)]
