import json

import pytest

from gcvit.errors import UserError
from gcvit.report.config_diff import describe_hardware, list_changes, tabulate_differences
from gcvit.report.run_data import best_top1, number, read_record, read_records
from gcvit.report.training import choose_scale, find_missing
from tests.helpers.run_folders import write_evaluation, write_images, write_rows, write_run, write_samples


def test_a_run_is_read_whole(tmp_path):
    record = read_record(write_run(tmp_path / "a", num_rows=12))
    assert record.name == "a"
    assert record.num_steps == 120
    assert len(record.of_kind("train")) == 12
    assert len(record.of_kind("start")) == 2
    assert record.batch_size == 64
    assert best_top1(record) == ("ema", 86.0, 120)
    assert record.problems == []
    assert find_missing(record) == ""


def test_the_secrets_of_a_url_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "a", num_rows=6)
    (folder / "config.yaml").write_text("data:\n  dir: 'https://me:secret@host/shards?token=secret'\n")
    record = read_record(folder)
    assert record.config == {"data": {"dir": "https://host/shards"}}
    assert record.config_text == "data:\n  dir: https://host/shards\n"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run here.*no folder"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(UserError, match="without metrics"):
        read_record(tmp_path)


def test_what_cannot_be_read_is_named_and_left_out(tmp_path):
    folder = write_run(tmp_path / "a", num_rows=6)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1, 2]\n{"step": 61, "kind": "tra')
    (folder / "config.yaml").write_text("- a list\n")
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "broken.json").write_text('{"name": "x"}')
    (folder / "evaluations" / "deep.json").write_text("[" * 100_000)
    write_samples(folder, 10)
    (folder / "samples" / "step_20.json").write_text("{}")
    record = read_record(folder)
    assert len(record.of_kind("train")) == 6
    assert (record.config, record.evaluations) == ({}, [])
    assert [grid.step for grid in record.samples] == [10]
    problems = " ".join(record.problems)
    for word in ("config.yaml", "2 lines of metrics.jsonl", "broken.json", "deep.json", "step_20.json"):
        assert word in problems


def test_an_older_run_tells_what_it_lacks(tmp_path):
    folder = write_run(tmp_path / "a")
    write_rows(folder, [{"step": 1, "kind": "train", "loss": 1.0}, {"step": 1, "kind": "val/weights", "top1": 5.0}])
    record = read_record(folder)
    assert find_missing(record) == "a has no accuracy on training batches and no EMA."
    assert best_top1(record) == ("weights", 5.0, 1)
    assert describe_hardware([record]) == ([], None)


@pytest.mark.parametrize("value", [None, True, "1", [1], float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_none(value):
    assert number(value) is None
    assert number(2) == 2.0


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    folders = [write_run(tmp_path / place, num_rows=2) for place in ("x/a", "y/a")]
    assert [record.name for record in read_records(folders)] == ["x/a", "y/a"]
    with pytest.raises(UserError, match="the same run twice"):
        read_records([folders[0], folders[0]])


def test_differences_are_those_knobs_that_differ(tmp_path):
    folders = [write_run(tmp_path / "a", 2, lr=1e-3), write_run(tmp_path / "b", 2, lr=2e-3)]
    (tmp_path / "b" / "config.yaml").write_text(
        (tmp_path / "b" / "config.yaml").read_text().replace('"engine"', '"seed": 5, "engine"')
    )
    rows = [[cell.text for cell in row] for row in tabulate_differences(read_records(folders)).rows]
    assert sorted(rows) == [["optim.lr", "0.001", "0.002"], ["seed", "–", "5"]]


def test_plain_evaluations_come_first(tmp_path):
    write_images(tmp_path / "data")
    folder = write_run(tmp_path / "a", 2)
    for name in ("real", "val", "sketch"):
        write_evaluation(folder, tmp_path / "data", name)
    assert [evaluation["name"] for evaluation in read_record(folder).evaluations] == ["val", "real", "sketch"]


def test_hardware_is_told_once_where_it_is_the_same(tmp_path):
    records = read_records([write_run(tmp_path / "a", 2), write_run(tmp_path / "b", 2, batch_size=128)])
    shared, table = describe_hardware(records)
    assert ("engine", "fsdp") in shared
    assert ("torch", "2.15.0") in shared
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["global batch", "64", "128"],
        ["micro-batch", "16", "32"],
    ]


def test_restarts_tell_what_changed(tmp_path):
    (sentence,) = list_changes(read_record(write_run(tmp_path / "a", 8)))
    assert sentence.startswith("Restart at step 40: ")
    assert "processes 8 → 4" in sentence
    assert "torch" not in sentence


def test_steps_of_different_sizes_are_compared_by_images(tmp_path):
    records = read_records([write_run(tmp_path / "a", 2), write_run(tmp_path / "b", 2, batch_size=128)])
    scale = choose_scale(records)
    assert scale.in_images
    assert scale.of(records[1], records[1].of_kind("train")).tolist() == [10 * 128, 20 * 128]
    assert not choose_scale(records[:1]).in_images


def test_fixtures_are_json_in_the_strict_sense(tmp_path):
    write_images(tmp_path / "data", num=1)
    for line in (write_run(tmp_path / "a", 4) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
