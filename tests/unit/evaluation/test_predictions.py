"""The table of predictions: ties, padding, the order of ranks, and the files that it is written to."""

import csv
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet
import pytest
import torch

from gcvit.errors import UserError
from gcvit.evaluation.evaluator import Scored, rank_of_label
from gcvit.evaluation.predictions import COLUMNS, Collector, check_path, key_of, open_writer, rows_of

CLASSES = [f"class {label}" for label in range(7)]


@dataclass
class Samples:
    is_chunked: bool = False

    def name(self, index: int) -> str:
        return f"val-000000.tar: a/{index}.jpg" if self.is_chunked else f"a: b/{index}.jpg"


@dataclass
class Ranks:
    """A world whose other ranks have these collectors."""

    others: list[Collector]

    def gather(self, own):
        alone = type("Alone", (), {"gather": lambda self, value: [value]})()
        return [own, *([getattr(other.gather(alone), name) for name in FIELDS] for other in self.others)]


FIELDS = ("indices", "labels", "ranks", "top", "confidences")
ALONE = Ranks([])


def collect(logits: torch.Tensor, labels: torch.Tensor, first: int = 0, num_padded: int = 0) -> Collector:
    """In batches of four rows, the last ones of which are padding."""
    collector = Collector()
    valid = torch.arange(len(logits)) < len(logits) - num_padded
    indices = torch.arange(first, first + len(logits))
    for at in range(0, len(logits), 4):
        rows = slice(at, at + 4)
        ranks = rank_of_label(logits[rows], labels[rows])
        collector(Scored(indices[rows], labels[rows], logits[rows], ranks, valid[rows]))
    return collector


@pytest.fixture
def logits() -> torch.Tensor:
    """With many ties."""
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).mul(2).round()


def test_the_table_agrees_with_the_ranks(logits):
    labels = torch.arange(12) % 7
    found = collect(logits, labels).gather(ALONE)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.top, order)
    for row in range(12):
        place = found.top[row].tolist().index(labels[row]) if labels[row] in found.top[row] else None
        assert place == (found.ranks[row] if found.ranks[row] < 5 else None)
    np.testing.assert_allclose(found.confidences, logits.softmax(1).amax(1).numpy(), rtol=1e-6)
    assert {name: getattr(found, name).dtype.name for name in FIELDS} == {
        "indices": "int64",
        "labels": "int32",
        "ranks": "int32",
        "top": "int32",
        "confidences": "float32",
    }


def test_padding_is_left_out_and_ranks_are_in_order(logits):
    labels = torch.arange(12) % 7
    alone = collect(logits, labels).gather(ALONE)
    padded = torch.cat([logits[6:], torch.zeros(2, 7)]), torch.cat([labels[6:], torch.zeros(2, dtype=torch.int64)])
    both = collect(logits[:6], labels[:6]).gather(Ranks([collect(*padded, first=6, num_padded=2)]))
    assert all(np.array_equal(getattr(alone, name), getattr(both, name)) for name in FIELDS)


def test_what_a_loader_made_is_not_kept(logits):
    """Its tensors lie in shared memory, each with a file descriptor."""
    labels = torch.zeros(12, dtype=torch.int64)
    collector = collect(logits, labels)
    labels += 1
    assert not collector.gather(ALONE).labels.any()


def test_a_model_of_two_classes_has_no_top_5():
    found = collect(torch.tensor([[0.0, 1.0]]), torch.tensor([1])).gather(ALONE)
    assert found.top.tolist() == [[1, 0]]
    (rows,) = rows_of("val", "ema", found, Samples(), ["cat", "dog"])
    assert (rows["top1"], rows["top2"], rows["top3"]) == (["dog"], ["cat"], [None])


def test_csv_and_parquet_hold_the_same_rows(logits, tmp_path, monkeypatch):
    monkeypatch.setattr("gcvit.evaluation.predictions._ROWS_AT_ONCE", 5)
    found = collect(logits, torch.arange(12) % 7).gather(ALONE)
    for suffix in ("csv", "parquet"):
        with open_writer(tmp_path / f"all.{suffix}") as append:
            for name in ("val", "v2"):
                for rows in rows_of(name, "ema", found, Samples(is_chunked=True), CLASSES):
                    append(rows)
    with open(tmp_path / "all.csv", newline="") as file:
        texts = list(csv.DictReader(file))
    table = pyarrow.parquet.read_table(tmp_path / "all.parquet")
    assert tuple(table.column_names) == COLUMNS == tuple(texts[0])
    rows = table.to_pylist()
    assert len(rows) == len(texts) == 24
    for row, text in zip(rows, texts, strict=True):
        assert np.float32(text.pop("confidence")) == np.float32(row.pop("confidence"))
        assert {name: str(value) for name, value in row.items()} == text
    assert (rows[12]["set"], rows[12]["index"], rows[12]["key"]) == ("v2", 0, "a/0.jpg")
    assert [row["label"] for row in rows[:8]] == [*CLASSES, CLASSES[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "all.parquet"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_half_a_file_has_no_name(logits, tmp_path, suffix):
    with pytest.raises(BlockingIOError), open_writer(tmp_path / f"all.{suffix}"):
        raise BlockingIOError  # of something else: it is no error of this file
    assert list(tmp_path.iterdir()) == []


def test_keys():
    assert key_of(Samples(is_chunked=True), 3) == "a/3.jpg"
    assert key_of(Samples(), 3) == "a: b/3.jpg"


def test_files_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"expected: \*.csv or \*.parquet"):
        check_path(tmp_path / "all.txt")
    with pytest.raises(UserError, match="no such folder"):
        check_path(tmp_path / "nowhere" / "all.csv")
    check_path(tmp_path / "all.parquet")
    monkeypatch.setattr("gcvit.evaluation.predictions.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        check_path(tmp_path / "all.parquet")
    with pytest.raises(UserError, match="cannot write"), open_writer(tmp_path / "nowhere" / "all.csv"):
        pass


def test_a_sample_that_comes_twice_is_noticed(logits):
    collector = collect(logits, torch.zeros(12, dtype=torch.int64))
    with pytest.raises(AssertionError, match="came twice"):
        collector.gather(Ranks([collector]))
