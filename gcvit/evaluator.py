"""Exact evaluation: every sample counted once, whatever the number of ranks.

All ranks take equally many steps of one fixed shape (a sharded model gathers its weights in every forward, so a rank
that stopped early would hang the others); padding is masked. Ranks sum integers, and one division comes last.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gcvit import checkpoint, progress, runfolder
from gcvit.config import Config, DataConfig
from gcvit.config_file import parse_config
from gcvit.data.source import Source
from gcvit.data.stream import eval_stream
from gcvit.data.transforms import normalize
from gcvit.errors import UserError
from gcvit.export import WEIGHTS_FILE, choose_kind, load_export
from gcvit.model import VARIANTS, GCViT, create_model, weights
from gcvit.parallel.build import build_model
from gcvit.parallel.world import World


@dataclass(frozen=True)
class Result:
    """Counts over the whole set."""

    num_samples: int
    correct_top1: int
    correct_top5: int
    loss: float  # mean cross entropy
    num_skipped: int = 0  # damaged samples, which are not among `num_samples`

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct_top1 / self.num_samples

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.correct_top5 / self.num_samples

    def as_json(self) -> str:
        """What `evaluate.py` prints. JSON has no word for the loss of a model that has diverged: null."""
        row = {name: value if math.isfinite(value) else None for name, value in self.as_dict().items()}
        return json.dumps(row, allow_nan=False)

    def as_dict(self) -> dict[str, float | int]:
        """The counts and what follows from them, as a row of metrics."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "num_samples": self.num_samples,
            "correct_top1": self.correct_top1,
            "num_skipped": self.num_skipped,
        }


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    source: Source,
    data: DataConfig,
    world: World,
    *,
    img_size: int,
    batch_size: int,
    skip_damaged: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> Result:
    """Run `model` ([B, 3, H, W] fp32 -> fp32 logits [B, C]) over all of `source`, together with the other ranks.

    `on_batch` is called after each step, equally often on all ranks. Errors: what it raises, and UserError for a
    damaged sample, unless `skip_damaged` leaves it out and counts it.
    """
    if batch_size < 1:
        raise UserError("--batch-size", got=batch_size, allowed="1 or more")
    counts = torch.zeros(4, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    stream = eval_stream(
        source,
        data,
        img_size=img_size,
        batch_size=batch_size,
        world_size=world.size,
        rank=world.rank,
        pin_memory=world.device.type == "cuda",
        skip_damaged=skip_damaged,
    )
    for batch in stream:
        for damage in batch.damaged:
            print(f"skipped: {damage.where} ({damage.reason})", file=sys.stderr, flush=True)
        labels, valid, images = (
            tensor.to(world.device, non_blocking=True) for tensor in (batch.labels, batch.valid, batch.images)
        )
        logits = model(normalize(images, data.mean, data.std))
        ranks = rank_of_label(logits, labels)
        counts[:3] += torch.stack([valid.sum(), ((ranks < 1) & valid).sum(), ((ranks < 5) & valid).sum()])
        counts[3] += len(batch.damaged)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
        loss += torch.where(valid, losses, 0.0).sum()
        progress.mark()
        on_batch()
    world.sum(counts)
    world.sum(loss)
    num_samples, correct_top1, correct_top5, num_skipped = counts.tolist()
    assert num_samples + num_skipped == source.num_samples, f"counted {num_samples} of {source.num_samples} samples"
    if not num_samples:
        raise UserError("all samples are damaged", got=num_skipped, cure="python -m data_prep.verify tells more")
    return Result(num_samples, correct_top1, correct_top5, loss.item() / num_samples, num_skipped)


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one, [B] int64; of equal logits the lower index stands first.

    A class whose logit is NaN stands before all, so that a broken model counts as wrong, not as right.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < labels[:, None])) | logits.isnan()
    return before.sum(1)


def load_run(path: str, kind: str | None, *, num_classes: int) -> tuple[GCViT, DataConfig]:
    """The model of a run folder (its best checkpoint), a checkpoint or an export, and how its data is prepared.

    `kind` is "ema" or "model"; None takes the EMA where there is one, and an export has no other. Errors: UserError
    where there is none.
    """
    if (Path(path) / WEIGHTS_FILE).exists():
        if kind is not None:
            raise UserError("an export holds one kind of weights", got=f"--weights {kind}", cure="leave it out")
        model, config = load_export(Path(path))
        _check_classes(config, path, num_classes)
        return model, config.data
    found = checkpoint.open_checkpoint(runfolder.find_checkpoint(Path(path)))
    config = parse_config(found.info["config"], source=str(found.path))
    _check_classes(config, found.path, num_classes)
    tensors = checkpoint.read_tensors(found, choose_kind(found, kind))
    model = build_model(config.model)
    model.load_state_dict(tensors)
    return model, config.data


def _check_classes(config: Config, path: str | Path, num_classes: int) -> None:
    if config.model.num_classes != num_classes:
        raise UserError(
            "the data has another number of classes than the model",
            got=f"{num_classes} classes",
            allowed=f"the {config.model.num_classes} of {path}",
            cure="give the data that it was trained for",
        )


def load_file(name: str, path: str, *, num_classes: int, img_size: int | None = None) -> tuple[GCViT, DataConfig]:
    """A variant with the weights in a file of any layout, and how the variant's card says data is prepared.

    At another `img_size` than the variant's the bias tables are resampled. Errors: UserError for a file that does not
    fit.
    """
    model = create_model(name, num_classes, img_size=img_size)
    weights.load(model, path, resample=img_size is not None)
    card = VARIANTS[name]
    return model, DataConfig(crop_pct=card.crop_pct, eval_resize="squash" if card.crop_mode == "squash" else "crop")
