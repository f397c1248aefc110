"""Good data and a finished run, which the tests of mistakes corruption copies of."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.launching import python
from tests.integration.bad_input.refusals import CLASSES, CONFIG, SHORT


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 4), ("val", 1)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def shards(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    done = python("-m", "data_prep.shard", images, out, "--shard-size", 8, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory) -> Path:
    """A finished run, whose files no mistake may touch."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--config", CONFIG, "--data_dir", images, "--tag", "old", f"output_dir={runs}", *SHORT]
    done = python("train.py", *words)
    assert done.returncode == 0, done.stderr
    return runs / "old"
