"""Check that ranks with the same tensors hold the same bits.

Replicas (every rank under ddp, the replicas of a shard under HSDP) make the same update from the same gradient and are
never compared again. A difference, by a faulty device or a bug, would stay for good, and a checkpoint would combine
parts of different models. So replicas are compared at every checkpoint.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gcvit.errors import UserError
from gcvit.parallel.engine import Fragments
from gcvit.runtime.distributed import World

_CHUNK = 1 << 20  # words that are hashed at once: it bounds the memory that hashing takes
# Odd and large: with small factors, words of two chunks shared a multiplier, and could be swapped unseen.
_CHUNK_FACTOR = 0x1E3779B97F4A7C15
_NUM_LISTED = 3  # tensors that the error names


def check_replicas(tensors: Mapping[str, Fragments], world: World) -> None:
    """Compare the fragments of all ranks that hold the same ranges, without copying a tensor to the host.

    Raises:
        UserError: Replicas differ; raised on all ranks, with the names of the tensors and the ranks.
    """
    replicated = {
        f"{kind}.{name}": part
        for kind, parts in tensors.items()
        for name, part in parts.items()
        if part.num_replicas > 1 and part.data.numel()
    }
    ranges = repr([(name, part.start, part.data.numel()) for name, part in replicated.items()])
    digests = digest_tensors([part.data for part in replicated.values()])
    here = _hash(ranges), _hash(repr(digests))  # few bytes: with thousands of ranks, lists of digests are many
    of_ranks = world.gather(here)
    if len({held for held, _ in of_ranks}) == len(set(of_ranks)):
        return
    lists = world.gather((here[0], list(zip(replicated, digests, strict=True))))
    for rank, (held, found) in enumerate(lists):
        first = next(other for other, (others, _) in enumerate(lists) if others == held)
        wrong = [name for (name, a), (_, b) in zip(found, lists[first][1], strict=True) if a != b]
        if wrong:
            raise UserError(
                "replicas of the model have diverged",
                got=f"other bits on rank {rank} than on rank {first} in {', '.join(wrong[:_NUM_LISTED])}"
                + (f" and {len(wrong) - _NUM_LISTED} more" if len(wrong) > _NUM_LISTED else ""),
                expected="equal tensors",
                hint="nothing was written: go on from the checkpoint before with --resume auto; "
                "if it happens again, look after the devices of these ranks",
            )


def digest_tensors(tensors: list[Tensor]) -> list[int]:
    """Compute a digest of each fp32 tensor [n]: any change of a single element changes it. Wait for the device once."""
    if not tensors:
        return []
    multipliers = torch.arange(1, 2 * _CHUNK, 2, device=tensors[0].device)
    return torch.stack([_digest(tensor, multipliers) for tensor in tensors]).tolist()


def _digest(tensor: Tensor, multipliers: Tensor) -> Tensor:
    """Sum (2 i + 1) x_i modulo 2^64 over the words x_i of each chunk, and the chunks as a polynomial in _CHUNK_FACTOR.

    An odd number has an inverse modulo 2^64, so no change of one word is lost. Words of 64 bits are faster than of 32.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for words in _words(tensor):
        total = total * _CHUNK_FACTOR + (words * multipliers[: words.numel()]).sum()
    return total


def _words(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bits of an fp32 tensor in chunks of integers: pairs as 64-bit words, then a last 32-bit word if any."""
    bits = tensor.detach().view(torch.int32)
    num_paired = bits.numel() // 2 * 2
    for pairs in bits[:num_paired].split(2 * _CHUNK):
        if pairs.numel():
            # The same words on every rank, wherever its memory begins.
            is_aligned = pairs.storage_offset() % 2 == 0 and pairs.data_ptr() % 8 == 0
            yield (pairs if is_aligned else pairs.clone()).view(torch.int64)
    if num_paired < bits.numel():
        yield bits[num_paired:]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
