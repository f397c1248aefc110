"""The row of a start: what a run works with, in a world of one."""

import platform
import socket
from types import SimpleNamespace

import pytest
import torch

import gcvit
from gcvit.config.load import load_config
from gcvit.model.flops import count_forward_flops
from gcvit.model.from_config import build_model
from gcvit.monitoring import environment
from gcvit.monitoring.environment import describe_environment
from gcvit.monitoring.schema import find_faults
from gcvit.runtime.distributed import join_world
from gcvit.runtime.gpu_specs import DEVICES
from tests.helpers.launching import ROOT

GOLDEN = ROOT / "tests/helpers/golden.yaml"


@pytest.fixture(scope="module")
def row():
    config, _ = load_config(GOLDEN)
    with join_world() as world:
        return describe_environment(config, world, micro_steps=2)


def test_it_is_a_row_of_the_schema(row):
    assert list(find_faults({"step": 0, "kind": "start", "time": 0.5, "samples": 0, **row})) == []


def test_it_says_what_there_is(row):
    assert (row["world_size"], row["hosts"], row["num_devices"]) == (1, [socket.gethostname()], 1)
    assert (row["engine"], row["precision"], row["accumulation"]) == ("ddp", "fp32", 2)
    assert (row["global_batch_size"], row["micro_batch_size"]) == (32, 32)
    versions = {"gcvit": gcvit.__version__, "python": platform.python_version()}
    assert versions.items() <= row["versions"].items()
    assert torch.__version__.startswith(row["versions"]["torch"])
    assert row["device"]


def test_an_image_costs_three_forward_passes(row):
    config, _ = load_config(GOLDEN)
    model = build_model(config.model)
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert row["train_flops_per_image"] == 3 * count_forward_flops(model, 32)


def test_hosts_are_named_once_in_the_order_of_their_ranks():
    config, _ = load_config(GOLDEN, ["trainer.micro_batch_size=4"])
    hosts = ["b", "b", "a", "a"]
    world = SimpleNamespace(device=torch.device("cpu"), size=4, gather=lambda mine: hosts)
    row = describe_environment(config, world, micro_steps=2)
    assert (row["hosts"], row["world_size"], row["micro_batch_size"]) == (["b", "a"], 4, 4)
    assert row["peak_flops"] is None


def test_the_peak_is_that_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    world = SimpleNamespace(device=torch.device("cuda"), size=1, gather=lambda mine: [mine])
    config, _ = load_config(GOLDEN, ["precision=bf16"])
    row = describe_environment(config, world, micro_steps=1)
    assert (row["device"], row["peak_flops"]) == ("NVIDIA H100 80GB HBM3", DEVICES["h100-80"].peaks["bf16"])


def test_the_commit_is_that_of_the_tree_with_a_sign_for_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "gcvit/monitoring/environment.py"))
    assert environment._commit() is None
    answers = {"rev-parse": "abc\n", "status": ""}
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(
        environment.subprocess, "run", lambda words, **options: SimpleNamespace(stdout=answers[words[3]])
    )
    assert environment._commit() == "abc"
    answers["status"] = " M train.py\n"
    assert environment._commit() == "abc+"
