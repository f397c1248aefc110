"""A model in ONNX computes in onnxruntime what it does in torch, for any batch; what cannot be exported leaves nothing.

One small model is exported once: the exporter takes as long as all the rest.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gcvit.checkpoint.weights_source import Classifier, open_classifier
from gcvit.errors import UserError
from gcvit.export import onnx_export
from gcvit.export.onnx_export import compare
from gcvit.model import create_model, weights
from tests.helpers.launching import python, succeed

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx_export.PACKAGES), reason="pip install 'gcvit[onnx]'"
)
NAME = "gc_vit_xxtiny"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose windows do not divide the maps: sides of 3, 3, 5 and 3 of 20, 10, 5 and 3 at 80 pixels."""
    path = tmp_path_factory.mktemp("source") / "xxtiny.pth.tar"
    model = create_model(NAME, num_classes=7, img_size=80)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.save({"state_dict": weights.to_official_state(model.state_dict())}, path)
    return path


@pytest.fixture(scope="module")
def exported(source: Path) -> tuple[Path, str]:
    target = source.with_name("deep") / "model.onnx"
    return target, succeed(python("-m", "gcvit.export.onnx_export", source, target)).stdout


@pytest.fixture(scope="module")
def classifier(source: Path) -> Classifier:
    return open_classifier(str(source), attention="reference")


def test_the_command_says_what_it_wrote_and_checked(exported: tuple[Path, str]) -> None:
    target, said = exported
    origin, written, checked = said.splitlines()
    assert "official layout" in origin
    assert written.startswith(f"{target}: 7 classes, ")
    assert checked.startswith("onnxruntime's logits differ from torch's by ")
    assert checked.endswith(" at most, in batches of 1 and 3")
    assert float(checked.split()[6]) < 1e-4
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]  # one file, its weights inside


def test_any_batch_computes_the_same(exported: tuple[Path, str], classifier: Classifier) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported[0], providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    side = classifier.model.img_size
    assert (given.name, given.shape[1:]) == ("images", [3, side, side])
    assert (returned.name, returned.shape[1:]) == ("logits", [7])
    assert isinstance(given.shape[0], str)  # a name: any batch
    for batch_size in (1, 3, 8):
        images = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(batch_size))
        with torch.no_grad():
            expected = classifier.model(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.01  # or equality would say little
        assert batch_size == 1 or not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_the_file_says_how_images_are_prepared(exported: tuple[Path, str], classifier: Classifier) -> None:
    onnx: Any = pytest.importorskip("onnx")
    properties = {entry.key: entry.value for entry in onnx.load(exported[0]).metadata_props}
    card = json.loads(properties["gcvit"])
    assert card == {
        "img_size": classifier.model.img_size,
        "crop_pct": 1.0,
        "eval_resize": "crop",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "classes": [f"class {label}" for label in range(7)],
    }


def test_another_result_is_refused(exported: tuple[Path, str], classifier: Classifier) -> None:
    """Other weights than those in the file, and a NaN, which no comparison would notice."""
    for change in (0.01, float("nan")):
        other = create_model(NAME, num_classes=7, img_size=classifier.model.img_size, attention="reference").eval()
        other.load_state_dict(classifier.model.state_dict())
        with torch.no_grad():
            other.head.fc.bias[3] += change
        with pytest.raises(UserError, match="onnxruntime computes other logits than torch"):
            compare(replace(classifier, model=other), exported[0])


def test_what_cannot_be_exported_leaves_nothing(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match="something is there already"):
        onnx_export.export_onnx(classifier, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    with pytest.raises(UserError, match="cannot write the model"):
        onnx_export.export_onnx(classifier, Path("/proc/nowhere/m.onnx"))
    monkeypatch.setattr(onnx_export, "_write", lambda classifier, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        onnx_export.export_onnx(classifier, tmp_path / "new.onnx")
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"got no no_such_package; hint: pip install 'gcvit\[onnx\]'"):
        onnx_export.export_onnx(classifier, tmp_path / "new.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
