"""The commands of somebody with photographs and weights: predict by a published name and by a file, convert; mistakes.

Weights are drawn, and published on loopback: what counts is that the commands agree with the model.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcvit.config.schema import DataConfig
from gcvit.data.transforms import EvalTransform, normalize
from gcvit.model import GCViT, create_model, layouts
from tests.helpers.hub_server import serve_hub
from tests.helpers.launching import python, succeed

FILE = "nvidia/GCViT/gcvit_1k_xxtiny.pth.tar"


@pytest.fixture(scope="module")
def published() -> GCViT:
    model = create_model("gc_vit_xxtiny").eval()
    torch.nn.init.normal_(model.head.fc.weight, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture(scope="module")
def content(published: GCViT) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": layouts.to_official_state(published.state_dict())}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        pixels = np.random.RandomState(seed).randint(0, 256, (230 + 20 * seed, 260, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_a_published_name_predicts_what_the_model_does(
    published: GCViT, content: bytes, images: Path, tmp_path: Path
) -> None:
    command = ["-m", "gcvit.predict", images, "--checkpoint", "gc_vit_xxtiny", "--top", 3, "--batch-size", 2, "--json"]
    with serve_hub({FILE: content}) as hub:
        done = succeed(python(*command, HF_HOME=str(tmp_path), HF_ENDPOINT=hub.url))
    assert done.stderr.count("CC-BY-NC-SA-4.0") == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(images / name) for name in ("a.png", "b.png", "c.png")]
    data = DataConfig(crop_pct=1.0)
    transform = EvalTransform(data, 224)
    for row in rows:
        pixels = normalize(transform(Path(row["image"]).read_bytes())[None], data.mean, data.std)
        with torch.no_grad():
            expected = published(pixels).softmax(1)[0].topk(3)
        assert [found["label"] for found in row["classes"]] == expected.indices.tolist()
        assert [found["probability"] for found in row["classes"]] == pytest.approx(expected.values.tolist(), rel=1e-3)
        assert all(found["name"] and not found["name"].startswith("class") for found in row["classes"])


@pytest.mark.slow
def test_a_converted_file_predicts_the_same_and_mistakes_exit_with_2(
    content: bytes, images: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "official.pth.tar", tmp_path / "timm.safetensors"
    source.write_bytes(content)
    convert = ["-m", "gcvit.model.weights", "convert", source, target, "--to", "timm"]
    done = succeed(python(*convert))
    assert done.stderr == ""  # no warning that the module was there before
    assert done.stdout.splitlines()[1] == f"{target}: timm layout, 226 tensors"
    predict = ["-m", "gcvit.predict", images / "b.png"]
    of_both = [succeed(python(*predict, "--checkpoint", file)) for file in (source, target)]
    assert of_both[0].stdout == of_both[1].stdout
    assert len(of_both[0].stdout.splitlines()) == 6
    assert "timm layout" in of_both[1].stderr
    (tmp_path / "broken.jpg").write_bytes((images / "a.png").read_bytes()[:5000])
    for command, said in (
        (convert, f"error: something is there already: got {target}"),
        ([*predict, tmp_path / "broken.jpg", "--checkpoint", target], f"got {tmp_path / 'broken.jpg'} ("),
    ):
        failed = python(*command)
        assert failed.returncode == 2
        assert said in failed.stderr.splitlines()[-1]
