"""Exact evaluation: every sample counted once, whatever the number of ranks.

All ranks take equally many steps of one fixed shape (a sharded model gathers its weights in every forward, so a rank
that stopped early would hang the others); padding is masked. Ranks sum integers, and one division comes last.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gcvit.config.schema import DataConfig
from gcvit.data.loader import eval_stream
from gcvit.data.source import Source
from gcvit.data.transforms import normalize
from gcvit.errors import UserError
from gcvit.evaluation.label_sets import Targets
from gcvit.runtime import heartbeat
from gcvit.runtime.distributed import World


@dataclass(frozen=True)
class Result:
    """Counts over the whole set."""

    num_samples: int
    correct_top1: int
    correct_top5: int
    loss: float  # mean cross entropy
    num_skipped: int = 0  # corrupt samples, which are not among `num_samples`
    num_unlabelled: int = 0  # samples without a label in the label set, nor are these

    @property
    def top1(self) -> float:
        """Return the accuracy in percent."""
        return 100 * self.correct_top1 / self.num_samples

    @property
    def top5(self) -> float:
        """Return the accuracy in percent."""
        return 100 * self.correct_top5 / self.num_samples

    def as_dict(self) -> dict[str, float | int]:
        """Return the counts and the values that follow from them, as a row of metrics."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "num_samples": self.num_samples,
            "correct_top1": self.correct_top1,
            "num_skipped": self.num_skipped,
        }


@dataclass(frozen=True)
class Scored:
    """The results of a batch on the device: b rows, of which those with `valid` False are padding."""

    indices: Tensor  # int64 [b], numbers of the samples in their source
    labels: Tensor  # int64 [b], the class of its folder
    logits: Tensor  # fp32 [b, C]
    ranks: Tensor  # int64 [b], see `rank_of_label`
    valid: Tensor  # bool [b]


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor],
    source: Source,
    data: DataConfig,
    world: World,
    *,
    img_size: int | Sequence[int],
    batch_size: int,
    skip_corrupt: bool = False,
    five_crop: bool = False,
    targets: Targets | None = None,
    watch: Callable[[Scored], None] = lambda scored: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Result:
    """Run `model` ([B, 3, H, W] fp32 -> fp32 logits [B, C]) over all of `source`, together with the other ranks.

    With several sizes the model takes as many batches, of the same samples, and with `five_crop` [5B, 3, H, W].
    `targets` are the right classes, by default the source's labels. `watch` is called with each batch, `on_batch` after
    each step, equally often on all ranks.

    Raises:
        UserError: A sample is corrupt, unless `skip_corrupt` leaves it out and counts it; or no sample is left.
    """
    if batch_size < 1:
        raise UserError("--batch-size", got=batch_size, expected="1 or more")
    counts = torch.zeros(5, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    streams = [
        eval_stream(
            source,
            data,
            img_size=size,
            batch_size=batch_size,
            world_size=world.size,
            rank=world.rank,
            pin_memory=world.device.type == "cuda",
            skip_corrupt=skip_corrupt,
            five_crop=five_crop,
        )
        for size in ([img_size] if isinstance(img_size, int) else img_size)
    ]
    targets = targets.to(world.device) if targets else None
    for batches in zip(*streams, strict=True):
        corrupt = {corruption.sample: corruption for batch in batches for corruption in batch.corrupt}
        for corruption in corrupt.values():
            tqdm.write(
                f"skipped: {corruption.where} ({corruption.reason})", file=sys.stderr
            )  # above a bar, if there is one
        indices, labels, valid = (
            tensor.to(world.device, non_blocking=True)
            for tensor in (
                batches[0].indices,
                batches[0].labels,
                torch.stack([batch.valid for batch in batches]).all(0),  # what is corrupt may depend on the size
            )
        )
        images = (batch.images.to(world.device, non_blocking=True) for batch in batches)
        logits = model(*(normalize(image, data.mean, data.std) for image in images))
        counts[3] += len(corrupt)
        if targets:
            labels = targets.labels[indices]
        if targets is None or targets.rights is None:
            ranks, losses = rank_of_label(logits, labels), F.cross_entropy(logits, labels, reduction="none")
        else:
            rights = targets.rights[indices]
            is_labelled = rights[:, 0] >= 0
            counts[4] += (valid & ~is_labelled).sum()
            valid = valid & is_labelled
            ranks, losses = judge_by_any(logits, rights.clamp(min=0))
        counts[:3] += torch.stack([valid.sum(), ((ranks < 1) & valid).sum(), ((ranks < 5) & valid).sum()])
        loss += torch.where(valid, losses.double(), 0.0).sum()
        watch(Scored(indices, labels, logits, ranks, valid))
        heartbeat.mark()
        on_batch()
    world.sum(counts)
    world.sum(loss)
    num_samples, correct_top1, correct_top5, num_skipped, num_unlabelled = counts.tolist()
    num_found = num_samples + num_skipped + num_unlabelled
    assert num_found == source.num_samples, f"counted {num_found} of {source.num_samples} samples"
    if not num_samples:
        raise UserError(
            "there is no sample to count",
            got=f"{num_skipped} corrupt, {num_unlabelled} without a label",
            hint="python -m data_prep.verify lists them" if num_skipped else "give other images",
        )
    return Result(num_samples, correct_top1, correct_top5, loss.item() / num_samples, num_skipped, num_unlabelled)


def rank_of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that rank before the right one.

    If logits are equal, the lower index ranks first. A class with a NaN logit ranks before all others, so that a
    diverged model counts as wrong.

    Args:
        logits: [B, C].
        labels: [B], int64.

    Returns:
        [B], int64; 0 if the right class ranks first.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < labels[:, None])) | logits.isnan()
    return before.sum(1)


def judge_by_any(logits: Tensor, rights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of the best of several right classes, and minus the logarithm of their total probability.

    `logits` is [B, C], `rights` int64 [B, R], where a class may occur repeatedly; both results are [B].
    """
    ranks = torch.stack([rank_of_label(logits, right) for right in rights.unbind(1)]).amin(0)
    is_right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, rights, True)
    return ranks, logits.logsumexp(1) - logits.masked_fill(~is_right, -torch.inf).logsumexp(1)
