import hashlib
import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gcvit.data import loader as module
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.loader import eval_stream, train_stream
from gcvit.data.source import open_source
from gcvit.data.transforms import DeviceAugment
from gcvit.errors import UserError
from tests.helpers.streaming import (
    NUM_TRAIN,
    NUM_VAL,
    PLAIN,
    assert_equal_rows,
    by_position,
    make_config,
    order_epoch,
    take_steps,
)

CPU = torch.device("cpu")


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
    batch_plan = BatchPlan(12, world_size, micro_batch_size, paired=True)
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert {len(rank) for rank in batches} == {batch_plan.num_micro_steps}
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


@given(
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 9),
    micro=st.integers(2, 9) | st.none(),
    num_workers=st.integers(0, 8),
    paired=st.booleans(),
    of_shards=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_epoch_takes_each_sample_once(
    source, shard_dir, batch_size, world_size, micro, num_workers, paired, of_shards
):
    source = open_source(shard_dir, "train") if of_shards else source
    batch_size *= 2 if paired else 1
    config = make_config(batch_size, num_workers, augment={} if paired else {"mix": None})
    num_batches = -(-3 * NUM_TRAIN // batch_size)
    seen = {}
    for rank in range(world_size):
        tasks, num_steps = plan(source, config, world_size, rank, micro)
        for task in itertools.islice(tasks, num_batches * num_steps * max(1, num_workers)):
            for epoch, place, sample in zip(task.epochs, task.positions, task.samples, strict=True):
                assert (epoch, place) not in seen
                seen[epoch, place] = sample
    orders = [[seen[epoch, place] for place in range(NUM_TRAIN)] for epoch in range(3)]
    assert all(sorted(order) == list(range(NUM_TRAIN)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    whole = order_epoch(source.first, source.length, seed=7, epoch=1, lanes=8, chunk_bytes=3000, shuffle_chunks=2)
    assert orders[1] == whole.tolist()


def plan(source, config, world_size, rank, micro, start_step=0):
    """The endless tasks of a rank, and how many micro-steps make a step."""
    batch_plan = BatchPlan.from_config(config, world_size, micro)
    micro_batches = batch_plan.micro_batches(rank, lanes=8)
    tasks = module._plan_training(source, config.data, config.seed, batch_plan, micro_batches, start_step)
    return tasks, batch_plan.num_micro_steps


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_rank_reads_its_share_once_in_chunks(shard_dir, monkeypatch, world_size, num_workers):
    """Two epochs: each chunk is one read of one worker, dropped after its last sample."""
    source = open_source(shard_dir, "train")
    config = make_config(16, num_workers)
    fetched = []
    monkeypatch.setattr(source, "fetch", lambda begin, end: fetched.append((begin, end)) or [memoryview(b"")] * 99)
    num_read = 0
    for rank in range(world_size):
        options = (source, config.data, config.augment, 32, config.seed)
        loaders = [module._TrainDataset(*options) for _ in range(num_workers)]
        tasks, num_steps = plan(source, config, world_size, rank, None)
        most_open = 0
        wanted = 0
        for number, task in enumerate(itertools.islice(tasks, 6 * num_steps * num_workers)):
            wanted += len(task.rows)
            for row, sample in enumerate(task.samples):
                chunk, is_last = (int(task.chunk_begin[row]), int(task.chunk_end[row])), bool(task.is_last[row])
                loaders[number % num_workers]._read(int(task.epochs[row]), sample, *chunk, is_last=is_last)
            most_open = max(most_open, sum(len(loader._chunks) for loader in loaders))
        assert wanted == 6 * 16 // world_size
        assert most_open <= 8 // world_size * 2 + 8  # lanes * shuffle_chunks, and the next epoch's first
        still_open = sum(len(loader._chunks) for loader in loaders)
        num_read += sum(end - begin for begin, end in fetched)
        assert len(fetched) < wanted / 1.5
        assert len(set(fetched)) > still_open
        fetched.clear()
    # Two epochs and two samples: what was begun of the third comes on top.
    assert 2 * NUM_TRAIN <= num_read <= 2 * NUM_TRAIN + 2 * 8 * 3


def test_ranks_without_lanes_of_their_own_read_single_samples(shard_dir):
    source = open_source(shard_dir, "train")
    tasks, _ = plan(source, make_config(12), 5, 1, None)
    for task in itertools.islice(tasks, 20):
        assert (task.chunk_begin == task.samples).all()
        assert (task.chunk_end == task.samples + 1).all()
        assert task.is_last.all()


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
    assert len(images[0]) >= NUM_TRAIN - 2  # RandAugment may leave two of these small ones blank
    assert len(images[0] & images[1]) <= 1


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


def test_shards_and_folders_give_the_same_epoch(source, shard_dir):
    def epoch(source):
        rows = by_position(take_steps(source, make_config(NUM_TRAIN, augment=PLAIN), 1)[0]).values()
        return sorted(int(label) for _, label, _ in rows)

    assert epoch(open_source(shard_dir, "train")) == epoch(source)


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
        batch_plan = BatchPlan.from_config(config, world_size=1, micro_batch_size=micro)
        with pytest.raises(UserError):
            train_stream(source, config, batch_plan, start_step=0, rank=0, pin_memory=False)


class Numbers:
    """A source without contents, in shards of any sizes."""

    is_chunked = True

    def __init__(self, sizes: list[int]):
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self.num_samples = int(self.first[-1])
        self.length = np.random.default_rng(0).integers(1, 900, self.num_samples).astype(np.uint32)

    def prefetch(self, shards) -> None:
        pass


def sequence_of(source, config, world_size, micro, steps) -> list[list[int]]:
    """The samples of the global batches of `steps`, by position, whichever rank and process takes them."""
    num_pieces = max(1, config.data.num_workers)
    batches: list[dict[int, int]] = [{} for _ in steps]
    for rank in range(world_size):
        tasks, num_steps = plan(source, config, world_size, rank, micro, start_step=steps.start)
        for batch in batches:
            for task in itertools.islice(tasks, num_steps * num_pieces):
                place = task.epochs * source.num_samples + task.positions
                taken = dict(zip(place.tolist(), task.samples.tolist(), strict=True))
                assert not taken.keys() & batch.keys()
                batch |= taken
    assert all(sorted(batch) == list(range(min(batch), min(batch) + config.global_batch_size)) for batch in batches)
    return [[batch[place] for place in sorted(batch)] for batch in batches]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(sum),
    num_pairs=st.integers(1, 40),
    worlds=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    num_workers=st.integers(0, 8),
    micro=st.integers(2, 9) | st.none(),
)
@settings(max_examples=40, deadline=None)
def test_another_world_goes_on_with_the_same_sequence(sizes, num_pairs, worlds, num_workers, micro):
    """A run stopped after step 2 and resumed on another world size takes the samples of one that was not."""
    source = Numbers(sizes)
    config = make_config(2 * num_pairs)
    other = make_config(2 * num_pairs, num_workers)
    whole = sequence_of(source, config, 1, None, range(5))
    begun, resumed = (
        sequence_of(source, other, world, micro, steps)
        for world, steps in zip(worlds, (range(2), range(2, 5)), strict=True)
    )
    assert begun + resumed == whole
    assert hash_of(begun + resumed) == hash_of(whole) != hash_of(whole[1:])
    flat = list(itertools.chain(*whole))
    for start in range(0, len(flat) - source.num_samples + 1, source.num_samples):
        assert sorted(flat[start : start + source.num_samples]) == list(range(source.num_samples))


def hash_of(sequence: list[list[int]]) -> str:
    return hashlib.sha256(np.array(list(itertools.chain(*sequence)), dtype="<i8").tobytes()).hexdigest()
