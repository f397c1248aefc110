"""Ranking the right class: ties, NaN, and agreement with topk; the counts of a whole set by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gcvit.config.schema import DataConfig
from gcvit.data.batch import EvalBatch
from gcvit.evaluation import evaluator
from gcvit.evaluation.evaluator import Result, evaluate, judge_by_any, rank_of_label
from gcvit.runtime.distributed import World


@given(
    seed=st.integers(0, 10_000),
    num_classes=st.integers(1, 30),
    levels=st.sampled_from([2, 5, None]),  # few levels make many ties
)
def test_ranks_are_those_of_a_stable_sort(seed, num_classes, levels):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, num_classes, generator=generator)
    if levels:
        logits = (logits * levels / 4).round()
    labels = torch.randint(num_classes, (16,), generator=generator)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    expected = [row.tolist().index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    assert rank_of_label(logits, labels).tolist() == expected


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10))
def test_without_ties_ranks_agree_with_topk(seed, k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(10, generator=generator).float() for _ in range(8)])
    labels = torch.randint(10, (8,), generator=generator)
    found = (logits.topk(k).indices == labels[:, None]).any(1)
    assert torch.equal(rank_of_label(logits, labels) < k, found)


def test_of_equal_logits_the_lower_index_stands_first():
    logits = torch.zeros(4, 4)
    assert rank_of_label(logits, torch.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [[0], [1], [0, 1, 2, 3, 4, 5, 6]])
def test_nan_is_wrong_never_right(bad):
    """Where all is NaN no comparison holds: a naive count would find nobody ahead and call it right."""
    logits = torch.arange(7.0).repeat(7, 1).flip(1)
    logits[:, bad] = torch.nan
    ranks = rank_of_label(logits, torch.arange(7))
    assert (ranks >= len(bad)).all()
    if len(bad) == 7:
        assert (ranks == 7).all()


def test_infinite_logits_are_ordered_too():
    logits = torch.tensor([[torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    assert rank_of_label(logits, torch.arange(3)).tolist() == [0, 1, 2]


@dataclass
class Five:
    """A source of five samples."""

    num_samples: int = 5


def test_padding_does_not_count(monkeypatch):
    """Five samples in batches of three: the sixth row is padding with a label of 0 that the model would get
    right."""
    images = torch.zeros(6, 3, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 2, 0, 0])
    valid = torch.tensor([True] * 5 + [False])

    def stream(source, data, *, img_size, batch_size, world_size, rank, pin_memory, skip_corrupt, five_crop):
        assert (img_size, batch_size, world_size, rank, five_crop) == (2, 3, 1, 0, False)
        for part in (slice(0, 3), slice(3, 6)):
            yield EvalBatch(images[part], labels[part], valid[part], torch.arange(6)[part])

    monkeypatch.setattr(evaluator, "eval_stream", stream)
    logits = torch.tensor([[4.0, 3, 2, 1, 0, -1, -2, -3]])

    def model(x: Tensor) -> Tensor:
        return logits.expand(len(x), 8)

    world = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    result = evaluate(model, Five(), DataConfig(), world, img_size=2, batch_size=3)
    assert (result.num_samples, result.correct_top1, result.correct_top5) == (5, 3, 5)
    assert (result.top1, result.top5) == (60.0, 100.0)
    expected = torch.nn.functional.cross_entropy(logits.expand(5, 8), labels[:5]).item()
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_a_sample_that_is_missing_is_noticed(monkeypatch):
    monkeypatch.setattr(evaluator, "eval_stream", lambda *_, **__: iter(()))
    world = World(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="counted 0 of 5"):
        evaluate(lambda x: x, Five(), DataConfig(), world, img_size=2, batch_size=3)


def test_a_row_of_metrics():
    row = Result(10_000, 8571, 9800, 0.7).as_dict()
    assert row["top1"] == pytest.approx(85.71)
    assert row["top5"] == pytest.approx(98.0)
    assert (row["num_samples"], row["correct_top1"]) == (10_000, 8571)


@given(seed=st.integers(0, 10_000), num_rights=st.integers(1, 4))
def test_of_several_right_classes_the_best_counts(seed, num_rights):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, 5, generator=generator) * 2).round()
    rights = torch.randint(5, (6, num_rights), generator=generator)
    ranks, losses = judge_by_any(logits, rights)
    assert ranks.tolist() == torch.stack([rank_of_label(logits, column) for column in rights.T]).amin(0).tolist()
    shares = [logits[i].softmax(0)[sorted(set(rights[i].tolist()))].sum() for i in range(6)]
    torch.testing.assert_close(losses, -torch.stack(shares).log())


def test_one_right_class_is_judged_as_ever():
    logits, labels = torch.randn(8, 7, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 7
    ranks, losses = judge_by_any(logits, labels[:, None].expand(8, 3))
    assert torch.equal(ranks, rank_of_label(logits, labels))
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
