"""What TensorBoard reads back, and what a stand-in for W&B is told: the same; and no secrets in either."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcvit.config.load import load_config
from gcvit.config.schema import Config
from gcvit.errors import UserError
from gcvit.monitoring.writers import Events, check_wandb, describe_targets, flatten, hide_secrets
from tests.helpers.launching import ROOT

GOLDEN = ROOT / "tests/helpers/golden.yaml"
URL = "https://user:SECRET@host/images?signature=SECRET"


@pytest.fixture
def config(tmp_path) -> Config:
    config, _ = load_config(GOLDEN, [f"output_dir={tmp_path}", f"data.dir={URL}"])
    config.run_dir.mkdir()
    return config


@pytest.fixture
def online(config, tmp_path, monkeypatch) -> Config:
    """The config with W&B switched on, and its stand-in in place."""
    monkeypatch.syspath_prepend(ROOT / "tests/integration/fake_wandb")
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    return config.model_copy(update={"wandb": True})


def calls(tmp_path: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return [row for row in rows if row.pop("call") == kind]


def write(config: Config, first_step: int = 0) -> None:
    events = Events(config, first_step)
    events.add_scalars("train", {"loss": 2.5, "lr": 1e-3}, first_step + 1)
    events.add_histogram("gradient_norms/stem", np.array([1.0, 2.0, 4.0]), first_step + 1)
    events.add_image("samples", np.full((8, 16, 3), 7, np.uint8), "60% cat + 40% dog", first_step + 1)
    events.add_result({"best_top1": 87.5}, first_step + 6)
    events.close(finished=True)


def test_tensorboard_reads_it_back(config):
    write(config, 4)
    read = EventAccumulator(str(config.run_dir)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(5, 2.5)]
    (histogram,) = read.Histograms("gradient_norms/stem")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (5, 3, 7)
    (image,) = read.Images("samples")
    assert (image.step, image.width, image.height) == (5, 16, 8)
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert texts["samples/targets/text_summary"] == "60% cat + 40% dog"
    assert "global_batch_size: 32" in texts["config/text_summary"]
    assert "https://host/images" in texts["config/text_summary"]
    assert [(event.step, event.value) for event in read.Scalars("result/best_top1")] == [(10, 87.5)]
    begin = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in begin
    metrics = read.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"result/best_top1" in metrics


def test_a_resume_hides_what_it_does_again(config):
    write(config, 4)
    write(config, 2)
    read = EventAccumulator(str(config.run_dir)).Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [3]
    assert [event.step for event in read.Scalars("result/best_top1")] == [8]


def test_wandb_gets_the_same(online, tmp_path):
    write(online, 4)
    logged = calls(tmp_path, "log")
    assert logged == [
        {"train/loss": 2.5, "train/lr": 1e-3, "step": 5},
        {"gradient_norms/stem": "Histogram", "step": 5},
        {"samples": "Image", "step": 5},
    ]
    assert calls(tmp_path, "define_metric") == [{"name": "*", "step_metric": "step"}]
    assert calls(tmp_path, "summary") == [{"result/best_top1": 87.5}]
    assert calls(tmp_path, "finish") == [{"exit_code": 0}]


def test_wandb_is_told_how_a_run_ends(online, tmp_path):
    Events(online, 0).close(finished=False)
    assert calls(tmp_path, "finish") == [{"exit_code": 1}]
    assert calls(tmp_path, "mark_preempting") == []
    events = Events(online, 0)
    events.mark_preempted()
    events.close(finished=False)
    assert calls(tmp_path, "mark_preempting") == [{}]


def test_the_project_is_ours_unless_the_environment_names_one(online, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    Events(online, 0).close(finished=True)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    Events(online, 0).close(finished=True)
    assert [call["project"] for call in calls(tmp_path, "init")] == ["gcvit", "theirs"]


def test_wandb_goes_on_with_the_run_of_the_folder(online, tmp_path):
    write(online)
    write(online, 4)
    first, second = calls(tmp_path, "init")
    assert first == second
    assert first["id"] == (online.run_dir / "wandb_id").read_text().strip()
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "golden", str(online.run_dir))
    assert first["config"]["optim"]["lr"] == online.optim.lr


def test_secrets_are_written_nowhere(online, tmp_path):
    write(online)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"SECRET" not in path.read_bytes(), path
    (init,) = calls(tmp_path, "init")
    assert init["settings"] == {"x_disable_meta": True, "disable_git": True, "disable_code": True}


def test_what_is_no_url_stays(config):
    plain = config.model_copy(update={"data": config.data.model_copy(update={"dir": "/data/a?b@c"})})
    assert hide_secrets(plain) == plain
    assert hide_secrets(config).data.dir == "https://host/images"


def test_a_missing_package_is_told_by_the_check(online, monkeypatch):
    check_wandb(online)
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(online.model_copy(update={"wandb": False}))
    with pytest.raises(UserError, match="not installed; hint: pip install wandb"):
        check_wandb(online)


def test_a_folder_of_that_name_is_no_package(config, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not installed"):
        check_wandb(config.model_copy(update={"wandb": True}))


def test_a_refusal_of_wandb_is_the_users_to_mend(online, monkeypatch):
    monkeypatch.setenv("FAKE_WANDB_REFUSES", "1")
    with pytest.raises(UserError, match="no such account; hint: wandb login"):
        Events(online, 0)


def test_flat_knobs_are_numbers_truths_and_texts():
    tree = {"a": {"b": 1, "c": {"d": True}}, "e": None, "f": [1, 2], "g": "x", "h": 0.5}
    assert flatten(tree) == {"a.b": 1, "a.c.d": True, "e": "null", "f": "[1, 2]", "g": "x", "h": 0.5}


def test_targets_in_words():
    assert describe_targets([["cat", 0.6], ["dog", 0.4]]) == "60% cat + 40% dog"
