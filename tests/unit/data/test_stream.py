import itertools
import multiprocessing
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcvit.config import Config
from gcvit.config_file import parse_config
from gcvit.data import stream
from gcvit.data.source import open_source
from gcvit.data.stream import eval_stream, num_micro_steps, train_stream
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import UserError

NUM_TRAIN, NUM_VAL = 47, 23
CPU = torch.device("cpu")


def make_config(global_batch_size: int = 12, num_workers: int = 0, **sections) -> Config:
    tree = {
        "tag": "test",
        "seed": 7,
        "global_batch_size": global_batch_size,
        "optim": {"lr": 1e-3},
        "schedule": {"cosine": "2 epochs"},
        "model": {"name": "any", "num_classes": 3, "img_size": 32},
        "data": {"num_workers": num_workers, "lanes": 8, "run_bytes": 3000, "open_runs": 2},
    }
    return parse_config(tree | sections, "test")


def take_steps(source, config, num_steps, *, start_step=0, world_size=1, rank=0, micro_batch_size=None):
    steps = train_stream(
        source,
        config,
        start_step=start_step,
        world_size=world_size,
        rank=rank,
        micro_batch_size=micro_batch_size,
        pin_memory=False,
    )
    return list(itertools.islice(steps, num_steps))


def by_position(batches):
    """{position: (image, label, erase)} of the non-empty rows, and no position twice."""
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


@pytest.fixture(scope="module")
def source(image_tree):
    return open_source(image_tree, "train")


@pytest.fixture(scope="module")
def reference(source):
    """Nine steps of one process: two and a quarter epochs."""
    return [by_position(step) for step in take_steps(source, make_config(), 9)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_every_world_sees_the_same_global_batches(source, reference, world_size, micro_batch_size):
    config = make_config()
    ranks = [
        take_steps(source, config, 5, world_size=world_size, rank=rank, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert {len(rank) for rank in batches} == {num_micro_steps(12, world_size, micro_batch_size, True)}
        assert_equal_rows(by_position(itertools.chain(*batches)), reference[step])


@pytest.mark.parametrize("start_step", [1, 3, 4, 8])
def test_resume_at_any_step(source, reference, start_step):
    (step,) = take_steps(source, make_config(), 1, start_step=start_step)
    assert_equal_rows(by_position(step), reference[start_step])


def test_mixed_images_do_not_depend_on_the_world(source):
    config = make_config(augment={"mix": {"group_size": 4}})
    augment = DeviceAugment(config.augment, config.data, 3, config.seed)

    def mixed(world_size, micro_batch_size):
        rows = {}
        for rank in range(world_size):
            (step,) = take_steps(
                source,
                config,
                1,
                start_step=2,
                world_size=world_size,
                rank=rank,
                micro_batch_size=micro_batch_size,
            )
            for batch in step:
                images, targets = augment(batch, 2, CPU)
                rows |= dict(zip(batch.positions.tolist(), zip(images, targets, strict=True), strict=True))
        return rows

    expected = mixed(1, None)
    assert len(expected) == 12
    for world_size, micro_batch_size in itertools.product((1, 2, 3, 5), (None, 2, 4)):
        assert_equal_rows(mixed(world_size, micro_batch_size), expected)


def plan(source, config, num_tasks, **place):
    return list(itertools.islice(stream._plan_training(source, config, **place), num_tasks))


@given(
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 9),
    micro=st.integers(2, 9) | st.none(),
    paired=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_each_epoch_takes_each_sample_once(source, batch_size, world_size, micro, paired):
    batch_size *= 2 if paired else 1
    config = make_config(batch_size, augment={} if paired else {"mix": None})
    num_steps = num_micro_steps(batch_size, world_size, micro, paired)
    num_batches = -(-3 * NUM_TRAIN // batch_size)
    seen = {}
    for rank in range(world_size):
        tasks = plan(
            source,
            config,
            num_batches * num_steps,
            start_step=0,
            world_size=world_size,
            rank=rank,
            micro_batch_size=micro,
        )
        for task in tasks:
            for epoch, place, sample in zip(task.epochs, task.places, task.samples, strict=True):
                assert (epoch, place) not in seen
                seen[epoch, place] = sample
    orders = [[seen[epoch, place] for place in range(NUM_TRAIN)] for epoch in range(3)]
    assert all(sorted(order) == list(range(NUM_TRAIN)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_labels_belong_to_their_images(source, reference):
    """Class c is bright in channel c (and RandAugment off: it moves colours)."""
    config = make_config(augment={"rand_augment": None})
    labels = Counter()
    for step in take_steps(source, config, 4):
        for image, label, _ in by_position(step).values():
            assert image.float().mean((1, 2)).argmax() == label
            labels[int(label)] += 1
    assert len(labels) == 3


def test_augmentation_changes_between_epochs(source):
    config = make_config(NUM_TRAIN, augment={"mix": None})
    epochs = [by_position(step) for step in take_steps(source, config, 2)]
    images = [{row[0].numpy().tobytes() for row in rows.values()} for rows in epochs]
    assert len(images[0]) == NUM_TRAIN
    assert len(images[0] & images[1]) == 0


def test_an_odd_batch_without_mixing(source):
    config = make_config(7, augment={"mix": None})
    ranks = [take_steps(source, config, 1, world_size=3, rank=rank)[0] for rank in range(3)]
    assert [len(batch.labels) for (batch,) in ranks] == [2, 2, 3]
    assert sorted(by_position(itertools.chain(*ranks))) == list(range(7))


def test_loading_leaves_the_global_generators_alone(source, image_tree):
    def draws():
        return random.random(), np.random.random(), float(torch.rand(1))  # noqa: NPY002

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002

    seed()
    expected = draws()
    seed()
    take_steps(source, make_config(), 2)
    list(
        eval_stream(
            open_source(image_tree, "val"),
            make_config().data,
            img_size=make_config().model.img_size,
            batch_size=4,
            world_size=1,
            rank=0,
        )
    )
    assert draws() == expected


def test_loader_processes_give_the_same_batches(source, reference, image_tree):
    steps = take_steps(source, make_config(num_workers=2), 3)
    for step, expected in zip(steps, reference, strict=False):
        assert_equal_rows(by_position(step), expected)
    val = open_source(image_tree, "val")
    batches = [
        list(
            eval_stream(
                val,
                make_config(num_workers=workers).data,
                img_size=make_config().model.img_size,
                batch_size=4,
                world_size=2,
                rank=1,
            )
        )
        for workers in (0, 2)
    ]
    for alone, loaded in zip(*batches, strict=True):
        assert torch.equal(alone.images, loaded.images)
        assert torch.equal(alone.indices, loaded.indices)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_sample_is_named(image_tree, tmp_path, num_workers):
    root = shutil.copytree(image_tree, tmp_path / "copy")
    (root / "train" / "bee" / "001.jpg").write_text("I am no image")
    with pytest.raises(UserError, match=r"no image that can be decoded: got bee/001.jpg") as caught:
        take_steps(open_source(root, "train"), make_config(num_workers=num_workers), 5)
    assert caught.value.rank_local
    assert not multiprocessing.active_children()  # though the error is still held


def test_a_truncated_shard_is_named(shard_dir):
    source = open_source(shard_dir, "train")
    tar = shard_dir / "train" / "train-000001.tar"
    with open(tar, "r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train-000001.tar: ") as caught:
        take_steps(source, make_config(), 5)
    assert caught.value.rank_local


def test_shards_and_folders_give_the_same_epoch(source, shard_dir):
    def epoch(source):
        rows = by_position(take_steps(source, make_config(NUM_TRAIN, augment=PLAIN), 1)[0]).values()
        return sorted(int(label) for _, label, _ in rows)

    assert epoch(open_source(shard_dir, "train")) == epoch(source)


PLAIN = {"mix": None, "rand_augment": None, "erase_prob": 0.0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_counts_each_sample_once(image_tree, world_size, batch_size):
    source = open_source(image_tree, "val")
    ranks = [
        list(
            eval_stream(
                source,
                make_config().data,
                img_size=make_config().model.img_size,
                batch_size=batch_size,
                world_size=world_size,
                rank=rank,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    indices = []
    for batch in itertools.chain(*ranks):
        assert batch.images.shape == (batch_size, 3, 32, 32)
        assert batch.labels.shape == batch.valid.shape == batch.indices.shape == (batch_size,)
        valid = batch.indices[batch.valid]
        assert batch.labels[batch.valid].tolist() == source.label[valid.numpy()].tolist()
        assert (batch.images[batch.valid].float().mean((2, 3)).argmax(1) == batch.labels[batch.valid]).all()
        indices += valid.tolist()
    assert sorted(indices) == list(range(NUM_VAL))


def test_more_processes_than_samples(image_tree):
    val = open_source(image_tree, "val")
    with pytest.raises(UserError, match="more processes than samples: got 24 for 23"):
        eval_stream(
            val,
            make_config().data,
            img_size=make_config().model.img_size,
            batch_size=4,
            world_size=24,
            rank=0,
        )
    with pytest.raises(UserError, match="more processes than samples"):
        take_steps(val, make_config(), 1, world_size=24)


def test_mistakes_are_told_before_the_first_batch(source):
    for config, micro in ((make_config(), 1), (make_config(augment={"rand_augment": "rand-z1"}), None)):
        with pytest.raises(UserError):
            train_stream(source, config, start_step=0, world_size=1, rank=0, micro_batch_size=micro, pin_memory=False)
