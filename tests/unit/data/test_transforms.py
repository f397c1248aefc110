import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, rand_augment_choices
from torch import Tensor

from gcvit.config.schema import AffineConfig, AugmentConfig, DataConfig, MixConfig
from gcvit.data.batch import Batch, Piece, empty_images, join_pieces
from gcvit.data.decode import DecodeError
from gcvit.data.transforms import (
    NO_ERASE,
    DeviceAugment,
    EvalTransform,
    TrainTransform,
    draw_erase,
    draw_mix,
    erase_boxes,
    normalize,
    preserved_generators,
    seed_sample,
    smooth_targets,
)
from gcvit.errors import UserError

DATA = DataConfig()
PLAIN = AugmentConfig(rand_augment=None, erase_prob=0, mix=None, label_smoothing=0)


def photo(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PHOTO = encode(photo(), "JPEG")

AUGMENTS = {
    "plain": PLAIN,
    "recipe": AugmentConfig(),
    "jitter": AugmentConfig(rand_augment=None, color_jitter=0.4, interpolation="bicubic"),
    "affine": AugmentConfig(affine=AffineConfig(degrees=10, translate=0.1, scale=(0.9, 1.1), shear=5)),
}


@pytest.mark.parametrize("name", AUGMENTS)
def test_train_transform_depends_on_the_seed_alone(name):
    transform = TrainTransform(AUGMENTS[name], DATA, 48)

    def view(seed, epoch, position):
        seed_sample(seed, epoch, position)
        return transform(PHOTO)

    image = view(1, 2, 3)
    assert (image.shape, image.dtype) == ((3, 48, 48), torch.uint8)
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    assert torch.equal(image, view(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not torch.equal(image, view(*other))


def test_affine_moves_the_image_within_its_limits():
    augment = PLAIN.model_copy(
        update={
            "scale": (1.0, 1.0),
            "ratio": (1.0, 1.0),
            "hflip": 0.0,
            "affine": AffineConfig(translate=0.25),
        }
    )
    transform = TrainTransform(augment, DATA, 40)
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[18:22, 18:22] = 255
    places = set()
    for position in range(40):
        seed_sample(0, 0, position)
        rows, columns = torch.nonzero(transform(encode(Image.fromarray(pixels), "PNG"))[0] > 128, as_tuple=True)
        places.add((int(rows.min()) - 18, int(columns.min()) - 18))
    assert len(places) > 30
    assert max(max(abs(y), abs(x)) for y, x in places) <= 10
    assert max(max(abs(y), abs(x)) for y, x in places) >= 8


def test_rand_augment_survives_every_operation_at_every_level():
    """Pillow 13 refuses to posterize to 0 bits, which timm asks for at the highest level."""
    hparams = {"translate_const": 20, "img_mean": (124, 116, 104)}
    names = {*rand_augment_choices("", increasing=True), *rand_augment_choices("", increasing=False)}
    assert names <= set(LEVEL_TO_ARG)
    image = photo(48, 48)
    for name in sorted(names):
        for level in np.linspace(0, 10, 41):
            assert AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)(image).size == image.size


@pytest.mark.parametrize("policy", ["rand-q9", "augmix", "", "rand-m9-mstdx1"])
def test_an_unknown_policy_is_the_users(policy):
    augment = AugmentConfig().model_copy(update={"rand_augment": policy or "-"})
    with pytest.raises(UserError, match=r"augment\.rand_augment is no policy"):
        TrainTransform(augment, DATA, 32)


def test_generators_are_preserved():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with preserved_generators():
        seed_sample(5, 6, 7)
        assert random.getstate() != states[0]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_normalize():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = (torch.tensor([0.0, 128 / 255, 1.0]) - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)
    torch.testing.assert_close(normalize(images, DATA.mean, DATA.std).view(3), expected)


def test_smooth_targets():
    targets = smooth_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_erase_is_drawn_with_its_probability_and_fits():
    with preserved_generators():
        random.seed(0)
        draws = [draw_erase(0.25, 32, 48) for _ in range(4000)]
    erased = [draw for draw in draws if draw != NO_ERASE]
    assert abs(len(erased) / 4000 - 0.25) < 0.03
    assert len({seed for *_, seed in erased}) == len(erased)
    for top, left, height, width, _ in erased:
        assert 0 <= top <= 32 - height
        assert 0 <= left <= 48 - width
        assert 0.015 < height * width / (32 * 48) < 0.35
    assert draw_erase(0.0, 32, 48) == NO_ERASE


def test_erased_pixels_are_normal_noise_of_the_samples_seed():
    images = torch.full((3, 3, 64, 64), 9.0)
    erase_boxes(images, torch.tensor([NO_ERASE, (10, 20, 40, 30, 77), (0, 0, 40, 30, 77)]))
    assert (images[0] == 9).all()
    noise = images[1, :, 10:50, 20:50]
    assert torch.equal(noise, images[2, :, :40, :30])
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.05
    assert (images == 9).sum() == 3 * (3 * 64 * 64) - 2 * 3 * 1200


@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mixup=0), MixConfig(cutmix=0), MixConfig(prob=0.3)])
def test_mix_draws(mix):
    draws = [draw_mix(np.random.default_rng(seed), mix, 32, 48) for seed in range(2000)]
    boxed = [draw for draw in draws if draw.bottom > draw.top and draw.right > draw.left]
    for draw in boxed:
        area = (draw.bottom - draw.top) * (draw.right - draw.left) / (32 * 48)
        assert draw.label_weight == pytest.approx(1 - area)
        assert draw.pixel_weight == 1
    mixed = [draw for draw in draws if draw.pixel_weight < 1]
    num_on = mix.prob * 2000
    cutmix_share = 0.5 if mix.mixup and mix.cutmix else float(mix.cutmix > 0)
    assert len(boxed) == pytest.approx(num_on * cutmix_share, abs=110)  # a narrow box may be empty
    assert len(mixed) == pytest.approx(num_on * (1 - cutmix_share), abs=110)


def make_batch(images: Tensor, labels: Tensor, positions: Tensor, erase: Tensor) -> Batch:
    return join_pieces(positions, (Piece(torch.arange(len(labels)), images, labels, erase, ()),))


def random_batch(positions: list[int], img_size: int = 24) -> Batch:
    """Rows that depend on their position alone."""
    images, labels, erase = empty_images(len(positions), img_size), [], []
    with preserved_generators():
        for row, position in enumerate(positions):
            seed_sample(0, 0, position)
            images[row] = torch.randint(0, 256, (3, img_size, img_size), dtype=torch.uint8)
            labels.append(random.randrange(7))
            erase.append(draw_erase(0.5, img_size, img_size))
    rows = torch.tensor(erase, dtype=torch.int64).view(-1, 5)
    return make_batch(images, torch.tensor(labels, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [MixConfig(group_size=8), MixConfig(cutmix=0, group_size=2), None])
def test_augmentation_does_not_depend_on_the_partition(mix, device):
    augment = DeviceAugment(AugmentConfig(mix=mix), DATA, num_classes=7, seed=3)
    images, targets = augment(random_batch(list(range(20))), 5, device)
    assert (images.dtype, targets.shape) == (torch.float32, (20, 7))
    torch.testing.assert_close(targets.sum(1), torch.ones(20, device=device))
    for part in ([4, 5], [0, 1, 18, 19], [6, 7, 8, 9, 10, 11], list(range(2, 20))):
        part_images, part_targets = augment(random_batch(part), 5, device)
        assert torch.equal(part_images, images[part])
        assert torch.equal(part_targets, targets[part])
    if mix:
        other_images, _ = augment(random_batch(list(range(20))), 6, device)
        assert not torch.equal(images, other_images)


@pytest.mark.gpu
def test_partners_share_labels_and_nobody_else(device):
    augment = DeviceAugment(AugmentConfig(label_smoothing=0, erase_prob=0), DATA, num_classes=8, seed=0)
    batch = make_batch(empty_images(8, 16), torch.arange(8), torch.arange(8), torch.zeros((8, 5), dtype=torch.int64))
    for step in range(20):
        _, targets = augment(batch, step, device)
        for row in range(8):
            others = [label for label in range(8) if label not in (row, row ^ 1)]
            assert targets[row, others].sum() == 0
            assert targets[row, row] == pytest.approx(float(targets[row ^ 1, row ^ 1]))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [MixConfig(), None])
def test_an_empty_batch_passes(mix, device):
    images, targets = DeviceAugment(AugmentConfig(mix=mix), DATA, 7, 0)(random_batch([]), 0, device)
    assert images.shape == (0, 3, 24, 24)
    assert targets.shape == (0, 7)


def test_no_warnings_for_recipe_ranges():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainTransform(AugmentConfig(), DATA, 32)(PHOTO)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (1, 500)])
def test_the_smallest_images_have_crops(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(buffer, "PNG")
    transform = TrainTransform(AugmentConfig(rand_augment=None), DataConfig(), 32)
    for position in range(100):
        seed_sample(0, 0, position)
        assert transform(buffer.getvalue()).shape == (3, 32, 32)


def test_a_strip_is_no_image_to_evaluate():
    """Its short side resized to 256, it would take gigabytes."""
    buffer = io.BytesIO()
    Image.new("L", (1, 65500)).save(buffer, "JPEG")
    with pytest.raises(DecodeError, match="exceed"):
        EvalTransform(DataConfig(), 224)(buffer.getvalue())
    assert EvalTransform(DataConfig(eval_resize="squash"), 224)(buffer.getvalue()).shape == (3, 224, 224)
