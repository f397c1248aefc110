"""From the stream to the model's input: any number of processes and micro-batches makes of a step the same samples."""

import numpy as np
import pytest
import torch

from gcvit.data.epoch_iterator import find_samples
from gcvit.data.source import open_source
from gcvit.data.transforms import DeviceAugment
from tests.helpers.streaming import make_config, take_steps

NUM_STEPS = 5  # of 12 among 47 samples: the fourth straddles two epochs
MIXES = [{"mixup": 0.8, "cutmix": 1.0, "group_size": 4}, {"mixup": 0.8, "cutmix": 0.0, "group_size": 2}]


def inputs_of(source, config, world_size: int, micro_batch_size: int | None) -> list[dict]:
    """For each step {position: (mixed image, mixed target)}, over all ranks."""
    augment = DeviceAugment(config.augment, config.data, num_classes=3, seed=config.seed)
    steps: list[dict] = [{} for _ in range(NUM_STEPS)]
    for rank in range(world_size):
        options = {"world_size": world_size, "rank": rank, "micro_batch_size": micro_batch_size}
        for step, batches in enumerate(take_steps(source, config, NUM_STEPS, **options)):
            for batch in batches:
                images, targets = augment(batch, step, torch.device("cpu"))
                for position, image, target in zip(batch.positions.tolist(), images, targets, strict=True):
                    assert position not in steps[step]
                    steps[step][position] = (image, target)
    return steps


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_inputs_and_targets_are_the_same_on_any_number_of_processes(image_tree, mix):
    source = open_source(image_tree, "train")
    config = make_config(augment={"mix": mix, "rand_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5})
    expected = inputs_of(source, config, 1, None)
    assert all(step.keys() == set(range(12)) for step in expected)
    soft = [target.max().item() < 0.9 for step in expected for _, target in step.values()]
    assert np.mean(soft) > 0.3, "hardly anything is mixed"
    for world_size, micro_batch_size in ((1, 4), (2, None), (3, 2), (4, None), (5, 2)):
        for step, other in zip(expected, inputs_of(source, config, world_size, micro_batch_size), strict=True):
            assert step.keys() == other.keys()
            for position, (image, target) in step.items():
                assert torch.equal(other[position][0], image)
                assert torch.equal(other[position][1], target)


def test_a_samples_number_is_found_again(image_tree):
    """By what the stream reads at each position, without augmentation."""
    source = open_source(image_tree, "train")
    plain = {"scale": [1, 1], "ratio": [1, 1], "hflip": 0, "mix": None, "rand_augment": None, "erase_prob": 0}
    config = make_config(augment=plain)
    labels = []
    for step, (batch,) in enumerate(take_steps(source, config, NUM_STEPS)):
        samples = find_samples(source, config.data, config.seed, 12 * step + batch.positions.numpy())
        assert source.label[samples].tolist() == batch.labels.tolist()
        labels += samples.tolist()
    assert sorted(labels[:47]) == list(range(47)), "an epoch has each sample once"
