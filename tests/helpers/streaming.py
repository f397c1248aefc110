"""Share code of the stream's tests: a small config, some steps, and their rows by position."""

import itertools

import numpy as np
import torch

from gcvit.config.load import parse_config
from gcvit.config.schema import Config
from gcvit.data.batch import Batch, Piece, join_pieces
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.epoch_order import EpochOrder
from gcvit.data.loader import train_stream

NUM_TRAIN, NUM_VAL = 47, 23
PLAIN = {"mix": None, "rand_augment": None, "erase_prob": 0.0}


def make_config(global_batch_size: int = 12, num_workers: int = 0, **sections) -> Config:
    tree = {
        "tag": "test",
        "seed": 7,
        "global_batch_size": global_batch_size,
        "optim": {"lr": 1e-3},
        "schedule": {"cosine": "2 epochs"},
        "model": {"name": "any", "num_classes": 3, "img_size": 32},
        "data": {"num_workers": num_workers, "lanes": 8, "chunk_bytes": 3000, "shuffle_chunks": 2},
    }
    return parse_config(tree | sections, "test")


def whole_batch(images, labels, positions, erase) -> Batch:
    """Wrap a batch as one piece."""
    rows = torch.arange(len(images)).numpy()
    return join_pieces(positions, (Piece(rows, images, labels.numpy(), erase.numpy(), ()),))


def take_steps(source, config, num_steps, *, start_step=0, world_size=1, rank=0, micro_batch_size=None):
    steps = train_stream(
        source,
        config,
        BatchPlan.from_config(config, world_size, micro_batch_size),
        start_step=start_step,
        rank=rank,
        pin_memory=False,
    )
    return list(itertools.islice(steps, num_steps))


def by_position(batches):
    """Return {position: (image, label, erase)} of the non-empty rows, and check that no position comes twice."""
    rows = {}
    for batch in batches:
        assert batch.images.shape[1:] == (3, 32, 32)
        for row, position in enumerate(batch.positions.tolist()):
            assert position not in rows
            rows[position] = (batch.images[row], batch.labels[row], batch.erase[row])
    return rows


def assert_equal_rows(got, expected):
    assert got.keys() == expected.keys()
    for position, row in expected.items():
        for one, other in zip(got[position], row, strict=True):
            assert torch.equal(one, other)


def order_epoch(first, length, **arguments) -> np.ndarray:
    """Compute the sample at each position of an epoch: [N]."""
    return EpochOrder(first, length, **arguments).lookup(np.arange(first[-1])).samples
