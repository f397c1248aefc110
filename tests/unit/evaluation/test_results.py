"""Records of evaluations: the names of their files, the table, and what cannot be written."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from gcvit.errors import UserError
from gcvit.evaluation.results import TABLE_FILE, as_line, as_table, hide_secrets, keep, make_folder


def make_record(name: str = "val", weights: str = "ema", step: int | None = 7, **result: Any) -> dict[str, Any]:
    counts = {"num_samples": 4, "correct_top1": 3, "correct_top5": 4, "num_skipped": 0}
    return {
        "name": name,
        "weights": weights,
        "checkpoint": {"path": "runs/a", "step": step, "sha256": "0123456789"},
        "data": {"dir": "/data", "split": "val", "sha256": "ab", "num_samples": 4},
        "options": {"label_set": "v2" if name == "v2" else None},
        "command": "evaluate.py runs/a",
        "versions": {"torch": "2"},
        **{"device": "cpu", "world_size": 1, "time": 1.0, "seconds": 2.0, "images_per_second": 2.0},
        "result": {"top1": 75.0, "top5": 100.0, "loss": 0.5, "ece": 0.1, **counts, "per_class": [], **result},
    }


def test_every_evaluation_has_its_file_and_a_row_of_the_table(tmp_path):
    keep(tmp_path, make_record(), [])
    keep(tmp_path, make_record(), ["224+256", "flip"])
    keep(tmp_path, make_record("v2", "model", top1=50.0), [])
    keep(tmp_path, make_record("a/b ö", "ema", None), [])
    keep(tmp_path, make_record(top1=25.0), [])  # again: in the place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_b__-ema-01234567.json",
        TABLE_FILE,
        "v2-model-step_00000007.json",
        "val-ema-step_00000007-224+256-flip.json",
        "val-ema-step_00000007.json",
    ]
    with open(tmp_path / TABLE_FILE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["set"], row["top1"]) for row in rows] == [
        ("a/b ö", "75.0"),
        ("v2", "50.0"),
        ("val", "75.0"),
        ("val", "25.0"),
    ]
    assert (rows[0]["checkpoint_sha256"], rows[0]["data_sha256"]) == ("0123456789", "ab")
    assert json.loads(rows[0]["versions"]) == {"torch": "2"}
    assert json.loads((tmp_path / "val-ema-step_00000007.json").read_text()) == make_record(top1=25.0)


def test_other_weights_data_and_options_take_no_ones_place(tmp_path):
    for other in range(2):
        for weights, data, batch_size in (("a", "d", 8), ("b", "d", 8), ("a", "e", 8), ("a", "d", 9)):
            record = make_record(top1=float(other))
            record["checkpoint"]["sha256"], record["data"]["sha256"] = weights, data
            record["options"]["batch_size"] = batch_size
            keep(tmp_path, record, [])
        assert len(list(tmp_path.glob("*.json"))) == 4
    with open(tmp_path / TABLE_FILE, newline="") as file:
        assert [row["top1"] for row in csv.DictReader(file)] == ["1.0"] * 4


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "gcvit"}')
    (tmp_path / "list.json").write_text("[]")
    keep(tmp_path, make_record(), [])
    assert len((tmp_path / TABLE_FILE).read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["", "v2=", "--data_dir=v2="])
def test_no_secret_of_a_url_is_kept(name):
    assert hide_secrets(f"{name}https://me:secret@host/x?sig=secret") == f"{name}https://host/x"
    assert hide_secrets(f"{name}/data/a=b") == f"{name}/data/a=b"


def test_a_line_has_no_clock():
    line = json.loads(as_line(make_record()))
    assert line == json.loads(as_line({**make_record(), "seconds": 9.0, "images_per_second": 1.0, "time": 2.0}))
    assert (line["name"], line["weights"], line["top1"], line["correct_top5"]) == ("val", "ema", 75.0, 4)
    assert json.loads(as_line(make_record(loss=None)))["loss"] is None


def test_the_table_is_aligned_and_tells_what_is_missing():
    head, first, second = as_table([make_record(loss=None), make_record("v2", "model")]).splitlines()
    assert len(head) == len(first) == len(second)
    assert first.split() == ["val", "ema", "75.000", "100.000", "–", "0.1000", "4", "2.0"]
    assert "4 (of 10000)" in second


def test_the_folder(tmp_path, capsys, monkeypatch):
    assert make_folder(None, tmp_path) == tmp_path / "evaluations"
    assert make_folder(str(tmp_path / "a/b"), tmp_path) == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()
    assert make_folder(None, None) is None
    assert "--out DIR" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot write to --out"):
        make_folder("/proc/nowhere", tmp_path)
    assert make_folder(None, Path("/proc/nowhere")) is None  # somebody else's run: said, and the result is printed
    assert "no record is kept: /proc/nowhere/evaluations" in capsys.readouterr().err
