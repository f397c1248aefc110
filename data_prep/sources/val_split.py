"""`--val-fraction`: which samples of a source without a val split go to one."""

import hashlib
import os

import numpy as np

from data_prep.sources.class_folders import group_classes
from gcvit.errors import UserError


def choose_val(paths: list[str], val_fraction: float, seed: int) -> np.ndarray:
    """Whether each of `paths`, CLASS/name sorted by class, goes to val: bool [N].

    It does where a hash of seed and path, uniform in [0, 1), lies below the fraction: the choice does not depend on
    other samples, so that those added later move none. A class of n samples has about n times the fraction in val,
    give or take the root of that, and a small one may have none there. One that would have all keeps the sample
    with the highest hash in train. Errors: UserError for a fraction out of range, or too small for any sample.
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
