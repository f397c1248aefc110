"""python -m gcvit.model.summary as a user starts it."""

import json

import torch
from PIL import Image

from gcvit.model import create_model
from tests.helpers.launching import python, succeed


def test_the_table():
    done = succeed(
        python("-m", "gcvit.model.summary", "gc_vit_xxtiny", "--img-size", 256, "--num-classes", 10, "--json")
    )
    table = json.loads(done.stdout)
    assert table[-1]["num_params"] == sum(row["num_params"] for row in table[:-1])
    assert table[1]["map_size"] == [64, 64]


def test_a_misspelt_name():
    wrong = python("-m", "gcvit.model.summary", "gc_vit_xtinyy")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean gc_vit_xtiny?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_drawing(tmp_path):
    Image.effect_noise((300, 200), 60).save(tmp_path / "noise.jpg")
    torch.save(create_model("gc_vit_xxtiny").state_dict(), tmp_path / "weights.pth")
    words = [
        "--attention",
        tmp_path / "noise.jpg",
        "--checkpoint",
        tmp_path / "weights.pth",
        "--out",
        tmp_path / "a.png",
    ]
    done = succeed(python("-m", "gcvit.model.summary", "gc_vit_xxtiny", *words))
    assert "gcvit layout" in done.stdout
    with Image.open(tmp_path / "a.png") as drawing:
        assert (drawing.format, drawing.width > 1000) == ("PNG", True)
