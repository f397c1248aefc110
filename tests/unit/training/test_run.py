"""What a run makes sure of before it starts."""

import pytest
import torch

from gcvit.checkpoint.resolve import write_config
from gcvit.config.load import load_config
from gcvit.errors import UserError
from gcvit.runtime.distributed import World
from gcvit.training.resume import check_alike
from tests.helpers.launching import ROOT

GOLDEN = ROOT / "tests/helpers/golden.yaml"


class Three(World):
    """Rank 0 of three, of which the last reads `file`."""

    def gather(self, value):
        return [value, value, self.digest or value]


def test_weights_that_differ_between_nodes(tmp_path):
    """Each process reads them itself; sharded engines would make one model of two."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    world = Three(0, 3, torch.device("cpu"), None)  # type: ignore[arg-type]
    object.__setattr__(world, "digest", None)
    check_alike(path, world)
    object.__setattr__(world, "digest", "another")
    with pytest.raises(UserError, match=r"weights\.pth.* rank 2 "):
        check_alike(path, world)


def test_a_config_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """It may be the file that the run was started from."""
    config = load_config(GOLDEN, [f"output_dir={tmp_path}"])[0]
    config.run_dir.mkdir()
    write_config(config)
    before = (config.run_dir / "config.yaml").read_text()
    (config.run_dir / "config.yaml.tmp").mkdir()  # nothing can be written there
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_config(replace_seed(config))
    assert (config.run_dir / "config.yaml").read_text() == before
    (config.run_dir / "config.yaml.tmp").rmdir()
    write_config(replace_seed(config))
    assert "seed: 99" in (config.run_dir / "config.yaml").read_text()


def replace_seed(config):
    return config.model_copy(update={"seed": 99})
