"""Test-time augmentation: the size and crop of images, and several views of each, whose probabilities are averaged."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gcvit.config.schema import DataConfig, ModelConfig
from gcvit.errors import UserError

NUM_CROPS = 5  # of `EvalTransform`'s five_crop; ten-crop is these and their mirror images
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """The options of a call that change numbers; None is the default of the run or of the variant's card."""

    img_size: tuple[int, ...] | None = None
    crop_pct: float | None = None
    resize: str | None = None
    """ "crop" or "squash": see `DataConfig.eval_resize`."""
    tta: str | None = None
    """ "flip" or "ten-crop"."""
    precision: str = "fp32"
    batch_size: int = 64
    """Per device; another one rounds differently."""
    skip_corrupt: bool = False

    @property
    def five_crop(self) -> bool:
        return self.tta == "ten-crop"

    @property
    def tags(self) -> list[str]:
        """List the options other than the defaults, for a file's name."""
        sizes = self.img_size and "+".join(map(str, self.img_size))
        crop = None if self.crop_pct is None else f"crop{self.crop_pct:g}"
        precision = None if self.precision == "fp32" else self.precision
        return [word for word in (sizes, crop, self.resize, self.tta, precision) if word]

    def sizes_of(self, model: ModelConfig) -> tuple[int, ...]:
        return self.img_size or (model.img_size,)

    def prepare(self, data: DataConfig) -> DataConfig:
        """Apply the options to the defaults of the image preparation.

        Raises:
            UserError: All crops would be the same.
        """
        given = {"crop_pct": self.crop_pct, "eval_resize": self.resize}
        data = data.model_copy(update={name: value for name, value in given.items() if value is not None})
        if self.five_crop and data.crop_pct == 1 and data.eval_resize == "squash":
            raise UserError("ten crops of the whole image are all the same", hint="give --crop-pct 0.875 or another")
        return data


class Views:
    """A model for `evaluate`: one batch of images for each of `models`, which are the same weights at several sizes.

    `five_crop` takes [5B, 3, H, W], `flip` adds the mirror images, `columns` ([K], None for all) are the outputs that
    compete. A single view gives the model's logits, several give the logarithm of the mean of their
    probabilities; [B, K], fp32. `dtype` other than fp32 is autocast's.
    """

    def __init__(
        self,
        models: Sequence[Callable[[Tensor], Tensor]],
        *,
        flip: bool = False,
        five_crop: bool = False,
        columns: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self._models, self._flip, self._five_crop = models, flip, five_crop
        self._columns, self._dtype = columns, dtype

    def __call__(self, *images: Tensor) -> Tensor:
        logits = [
            self._run_view(model, view)
            for model, batch in zip(self._models, images, strict=True)
            for view in self._views(batch)
        ]
        if len(logits) == 1:
            return logits[0]
        shares = torch.stack([one.log_softmax(1) for one in logits])
        return shares.logsumexp(0) - math.log(len(logits))

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        # One after the other, so that more views need no more memory.
        for first in range(NUM_CROPS if self._five_crop else 1):
            view = images[first::NUM_CROPS].contiguous() if self._five_crop else images
            yield view
            if self._flip:
                yield view.flip(3)

    def _run_view(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        is_lower = self._dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self._dtype if is_lower else None, enabled=is_lower):
            logits = model(images).float()
        return logits if self._columns is None else logits[:, self._columns]
