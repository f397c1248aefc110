"""Transform encoded bytes to the model's input: decode and augment on the host, the rest on the device.

The host's part works on 8-bit pixels, by timm's rules and in timm's order of draws. Its crops are resized by torch's
antialiased kernels, which are Pillow's within rounding; RandAugment and the like are timm's own, on Pillow images. A
sample draws from (seed, epoch, position in the epoch) alone, a mixed group from (seed, step, group): neither knows
who computes it. The device normalises, erases, mixes.
"""

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import CenterCrop, ColorJitter, FiveCrop, InterpolationMode, RandomAffine, Resize

from gcvit.config.schema import AugmentConfig, DataConfig, MixConfig
from gcvit.data.batch import Batch
from gcvit.data.decode import Box, Bytes, DecodeError, EncodedImage, Pixels, decode
from gcvit.data.image_files import MAX_PIXELS
from gcvit.data.stage_timer import StageTimer
from gcvit.errors import UserError

ERASE_AREA = (0.02, 1 / 3)  # share of the image; these and the aspect ratio are timm's defaults
ERASE_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
# A JPEG's crop may be decoded smaller, down to so many times the output's side. Nearer to it, what the decoder cuts off
# and what an antialiased resize does come to differ by more than 1 % of the range.
_MIN_DECODED = 1.25
NO_ERASE = (0, 0, 0, 0, 0)
# The second number separates streams of draws with the same seed.
_SAMPLE_STREAM, _MIX_STREAM = 2, 3


class TrainTransform:
    """A random view of an encoded image, uint8 [3, S, S]: crop, flip, affine map, RandAugment or colour jitter.

    In memory the channels come last, as decoders leave them: the device puts them first in no time, a processor
    needs a quarter of a resize. Draws come from Python's, NumPy's and torch's global generators: see `seed_sample`.
    Its `timer` separates "decoding" from "augmentation".
    """

    def __init__(self, augment: AugmentConfig, data: DataConfig, img_size: int):
        """Build the steps after the crop.

        Raises:
            UserError: timm cannot parse the RandAugment policy.
        """
        self.timer = StageTimer()
        self._augment, self._upright, self._img_size = augment, data.exif_orientation, img_size
        self._steps: list[Callable[[Image.Image], Image.Image]] = []
        if affine := augment.affine:
            translate = (affine.translate, affine.translate) if affine.translate else None
            bilinear = InterpolationMode.BILINEAR
            self._steps.append(RandomAffine(affine.degrees, translate, affine.scale, affine.shear or None, bilinear))
        if augment.rand_augment:
            self._steps.append(_rand_augment(augment.rand_augment, data.mean, img_size, augment.interpolation))
        if augment.color_jitter:
            self._steps.append(ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))

    def __call__(self, content: Bytes) -> Tensor:
        """Transform an image.

        Raises:
            DecodeError: the bytes are not a supported image, or corrupt.
        """
        self.timer.switch("decoding")
        encoded = EncodedImage(content, upright=self._upright)
        box = draw_crop(self._augment.scale, self._augment.ratio, encoded.height, encoded.width)
        interpolation: str = self._augment.interpolation
        if interpolation == "random":
            interpolation = random.choice(("bilinear", "bicubic"))
        flip = torch.rand(1).item() < self._augment.hflip
        pixels, inner = encoded.read(box, math.ceil(_MIN_DECODED * self._img_size))
        self.timer.switch("augmentation")
        pixels = _resize(pixels, inner, self._img_size, interpolation)
        if not self._steps:
            view = torch.from_numpy(pixels.transpose(2, 0, 1))
            return view.flip(2) if flip else view
        image = Image.fromarray(pixels)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for step in self._steps:
            image = step(image)
        return to_tensor(image)


def draw_crop(scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int) -> Box:
    """Draw a box of a share `scale` of the area and an aspect ratio (uniform in its logarithm) within `ratio`.

    If ten draws do not fit, it is the largest central box within `ratio` (Szegedy et al., 2015; the order of draws is
    timm's).
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = random.uniform(*scale) * (height * width)
        aspect = math.exp(random.uniform(*log_ratio))
        # At least a pixel, where timm would fail.
        box_width, box_height = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if box_height <= height and box_width <= width:
            top, left = random.randint(0, height - box_height), random.randint(0, width - box_width)
            return Box(top, left, box_height, box_width)
    box_height, box_width = height, width
    if width / height < min(ratio):
        box_height = max(1, round(width / min(ratio)))
    elif width / height > max(ratio):
        box_width = max(1, round(height * max(ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _resize(pixels: Pixels, box: Box, size: int, interpolation: str) -> Pixels:
    """Resize a box of pixels uint8 [h, w, 3] to [size, size, 3], antialiased, bilinear or bicubic."""
    pixels = np.ascontiguousarray(pixels)  # else both kernels copy, and more slowly
    if pixels.shape[:2] == (box.height, box.width):
        # The first stride must be that of a batch in channels-last order, or torch repacks the pixels.
        image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(image, (size, size), mode=interpolation, antialias=True)
        return resized.numpy()[0].transpose(1, 2, 0)
    # torch cannot cut a pixel.
    edges = box.left, box.top, box.left + box.width, box.top + box.height
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling[interpolation.upper()], edges))


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3, H, W]; in memory the channels come last, as Pillow writes them."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _rand_augment(
    policy: str, mean: Sequence[float], img_size: int, interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    """Build timm's RandAugment; areas that it uncovers get the mean colour."""
    hparams = {
        "translate_const": int(img_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
    }
    if interpolation != "random":
        hparams["interpolation"] = Image.Resampling[interpolation.upper()]
    try:
        return rand_augment_transform(policy, hparams)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            "augment.rand_augment is no policy of timm's RandAugment",
            got=f"{policy!r}" + (f" ({error})" if str(error) else ""),
            expected="rand-m9-mstd0.5-inc1 and the like, or null",
        ) from None


class EvalTransform:
    """The published view of an encoded image, bicubic, uint8 [3, S, S]: Pillow's pixels, as published accuracies.

    `eval_resize=crop` takes the short side to S / crop_pct, squash both sides; then the centre is cropped. With
    `five_crop` it is [5, 3, S, S]: the corners, row by row, and the centre.
    """

    def __init__(self, data: DataConfig, img_size: int, five_crop: bool = False):
        side = math.floor(img_size / data.crop_pct)
        size = (side, side) if data.eval_resize == "squash" else side
        self._side, self._by_short_side = side, data.eval_resize == "crop"
        self._resize = Resize(size, InterpolationMode.BICUBIC)
        self._crop, self._five_crop = CenterCrop(img_size), FiveCrop(img_size) if five_crop else None
        self._upright = data.exif_orientation

    def __call__(self, content: Bytes) -> Tensor:
        """Transform an image.

        Raises:
            DecodeError: the bytes are not a supported image, or corrupt.
        """
        image = decode(content, upright=self._upright)
        # A strip of a pixel's width would become gigabytes.
        if self._by_short_side and max(image.size) * self._side**2 > MAX_PIXELS * min(image.size):
            raise DecodeError(f"{image.width} x {image.height} pixels exceed 2^27 at a short side of {self._side}")
        resized = self._resize(image)
        if self._five_crop:
            return torch.stack([to_tensor(view) for view in self._five_crop(resized)])
        return to_tensor(self._crop(resized))


def seed_sample(seed: int, epoch: int, position: int) -> None:
    """Seed all global generators for one sample: its augmentation is the same wherever it is loaded."""
    # A hash, since NumPy's SeedSequence is as slow as all the rest.
    digest = hashlib.blake2b(f"{seed} {_SAMPLE_STREAM} {epoch} {position}".encode(), digest_size=32).digest()
    random.seed(int.from_bytes(digest[:16], "little"))
    np.random.seed(int.from_bytes(digest[16:20], "little"))  # noqa: NPY002  (timm draws from the global generator)
    # Not torch.manual_seed, which also seeds, or queues seeds for, every accelerator.
    torch.default_generator.manual_seed(int.from_bytes(digest[24:], "little"))


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global generators at the end: loading must not change the draws of the process itself."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def draw_erase(prob: float, height: int, width: int) -> tuple[int, int, int, int, int]:
    """Draw top, left, height and width of the rectangle to erase, and the seed of its noise, or `NO_ERASE`."""
    if random.random() > prob:
        return NO_ERASE
    for _ in range(10):
        area = random.uniform(*ERASE_AREA) * height * width
        aspect = math.exp(random.uniform(*ERASE_LOG_ASPECT))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top, left = random.randint(0, height - box_height), random.randint(0, width - box_width)
            return top, left, box_height, box_width, random.getrandbits(63)
    return NO_ERASE


class MixDraw(NamedTuple):
    """How the samples of a group are mixed, each with its partner."""

    label_weight: float  # of a sample's own label
    pixel_weight: float  # of its own pixels; 1 in cutmix
    top: int  # the box of partner's pixels; empty in mixup
    bottom: int
    left: int
    right: int


def draw_mix(rng: np.random.Generator, mix: MixConfig, height: int, width: int) -> MixDraw:
    """Draw lambda, switch and box in the order of timm's `Mixup`; lambda is corrected for a clipped box."""
    if rng.random() >= mix.prob:
        return MixDraw(1.0, 1.0, 0, 0, 0, 0)
    use_cutmix = mix.cutmix > 0
    if mix.mixup and mix.cutmix:
        use_cutmix = rng.random() < (0.5 if mix.switch_prob is None else mix.switch_prob)
    alpha = mix.cutmix if use_cutmix else mix.mixup
    weight = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return MixDraw(weight, weight, 0, 0, 0, 0)
    side = math.sqrt(1 - weight)
    box_height, box_width = int(height * side), int(width * side)
    center_y, center_x = int(rng.integers(0, height)), int(rng.integers(0, width))
    top, bottom = max(center_y - box_height // 2, 0), min(center_y + (box_height + 1) // 2, height)
    left, right = max(center_x - box_width // 2, 0), min(center_x + (box_width + 1) // 2, width)
    return MixDraw(1 - (bottom - top) * (right - left) / (height * width), 1.0, top, bottom, left, right)


def mix_pairs(images: Tensor, targets: Tensor, draws: Sequence[MixDraw]) -> tuple[Tensor, Tensor]:
    """Mix rows 2k and 2k+1 of images [b, 3, H, W] and targets [b, C] by one draw a row."""
    # Weights are rounded to float32 after 1 - weight is computed, as with a Python scalar.
    shares = [(draw.label_weight, 1 - draw.label_weight, draw.pixel_weight, 1 - draw.pixel_weight) for draw in draws]
    weights = torch.tensor(shares, dtype=torch.float32)
    boxes = torch.tensor([draw[2:] for draw in draws], dtype=torch.int32)
    own_label, other_label, own_pixel, other_pixel = _send(weights, images.device).T[:, :, None]
    top, bottom, left, right = _send(boxes, images.device).T[:, :, None]
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    mixed = images * own_pixel[..., None, None] + partners * other_pixel[..., None, None]
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    in_box = ((row >= top) & (row < bottom))[:, None, :, None] & ((column >= left) & (column < right))[:, None, None]
    other_targets = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.where(in_box, partners, mixed), targets * own_label + other_targets * other_label


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize uint8 [b, 3, H, W] to contiguous float32; mean and std refer to pixels in [0, 1]."""
    constants = torch.tensor([[255 * value for value in row] for row in (mean, std)], dtype=torch.float32)
    shift, factor = _send(constants, images.device)[:, :, None, None]
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(shift).div_(factor)


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smooth labels [b] to float32 [b, num_classes]: 1 - smoothing at the label, the rest over all classes."""
    rest = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), rest, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + rest)


def erase_boxes(images: Tensor, erase: Tensor) -> None:
    """Replace the rectangles `erase` (`Batch.erase`) of normalised images [b, 3, H, W] by normal noise.

    The noise has the sample's own seed. It is the same for all partitions of a batch on one kind of device.
    """
    generator = torch.Generator(images.device)
    for image, (top, left, height, width, seed) in zip(images, erase.tolist(), strict=True):
        if height:
            noise = torch.randn((3, height, width), generator=generator.manual_seed(seed), device=images.device)
            image[:, top : top + height, left : left + width] = noise


class DeviceAugment:
    """The part of the augmentation that runs on the device: normalize, erase, smooth the labels, mix."""

    def __init__(self, augment: AugmentConfig, data: DataConfig, num_classes: int, seed: int):
        self._augment, self._data, self._num_classes, self._seed = augment, data, num_classes, seed

    def __call__(self, batch: Batch, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Augment a batch to images float32 [b, 3, H, W] and targets float32 [b, num_classes]; b may be 0."""
        return self.augment(batch.images_on(device), batch, step)

    def augment(self, images: Tensor, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Augment as `__call__`, with the images of the batch, uint8 [b, 3, H, W], on the device already."""
        device = images.device
        images = normalize(images, self._data.mean, self._data.std)
        erase_boxes(images, batch.erase)
        targets = smooth_targets(_send(batch.labels, device), self._num_classes, self._augment.label_smoothing)
        mix = self._augment.mix
        if mix is None or not len(images):
            return images, targets
        groups = (batch.positions // mix.group_size).tolist()
        height, width = images.shape[2:]
        draw_of = {group: draw_mix(self._group_rng(step, group), mix, height, width) for group in set(groups)}
        return mix_pairs(images, targets, [draw_of[group] for group in groups])

    def _group_rng(self, step: int, group: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence((self._seed, _MIX_STREAM, step, group)))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # Without non_blocking, a copy to a GPU waits until the GPU has done all that was launched before.
    return tensor.to(device, non_blocking=True)
