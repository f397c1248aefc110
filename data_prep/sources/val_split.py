"""Choose a val split for a source without one (`--val-fraction`)."""

import hashlib
import os

import numpy as np

from data_prep.sources.class_folders import group_classes
from gcvit.errors import UserError


def choose_val(paths: list[str], val_fraction: float, seed: int) -> np.ndarray:
    """Choose which of `paths`, CLASS/name sorted by class, go to val.

    A sample goes to val if a hash of seed and path, uniform in [0, 1), is below the fraction. The choice does not
    depend on other samples, so that samples added later move none. The number in val of a class is binomial; a small
    class may have none there. If all samples of a class would go to val, the one with the highest hash stays in train.

    Returns:
        Whether each path goes to val: bool [N].

    Raises:
        UserError: The fraction is out of range, or too small for any sample.
    """
    if not 0 < val_fraction < 1:
        raise UserError("--val-fraction is out of range", got=val_fraction, expected="above 0 and below 1")
    in_val: list[np.ndarray] = []
    for _, group in group_classes(paths):
        hashes = np.array([_hash(seed, path) for path in group])
        chosen = hashes < val_fraction
        chosen[hashes.argmax()] &= not chosen.all()
        in_val.append(chosen)
    if not any(chosen.any() for chosen in in_val):
        got = f"{val_fraction} of {len(paths)} samples"
        raise UserError("--val-fraction leaves val without samples", got=got, hint="raise it")
    return np.concatenate(in_val)


def _hash(seed: int, path: str) -> float:
    digest = hashlib.blake2b(os.fsencode(f"{seed} {path}"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
