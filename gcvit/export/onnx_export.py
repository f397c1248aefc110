"""Export a classifier to ONNX, and check what onnxruntime computes with it.

    python -m gcvit.export.onnx_export runs/gc_vit_tiny gc_vit_tiny.onnx
    python -m gcvit.export.onnx_export gcvit_1k_tiny.pth.tar gc_vit_tiny.onnx

SRC is what gcvit.predict takes as --checkpoint. The model maps "images" (batch, 3, H, W), fp32 and normalised, to
"logits" (batch, classes), for any batch. How to prepare images stands in the file's metadata, as JSON under "gcvit":
img_size, crop_pct, eval_resize, mean, std (of pixels in [0, 1]) and classes. Needs pip install 'gcvit[onnx]'.
"""

import contextlib
import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.export import Dim

from gcvit.checkpoint.weights_source import Classifier, open_classifier
from gcvit.errors import UserError
from gcvit.runtime.command_line import command_parser
from gcvit.runtime.entrypoint import run_main

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED_BATCHES = (1, 3)
MAX_DIFFERENCE = 1e-4
"""Bound of the difference from torch's logits, relative to the largest of them if that exceeds 1: fp32 rounding."""


def export_onnx(classifier: Classifier, target: Path) -> str:
    """Write the model to one ONNX file, and check its logits in onnxruntime.

    The classifier must have been opened with attention="reference", which is made of plain operators. The file is
    complete and checked, or absent.

    Returns:
        A message about the file and the check.

    Raises:
        UserError: A package is missing, the target exists or cannot be written, or onnxruntime computes other logits.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            "ONNX export without its packages", got=f"no {', '.join(missing)}", hint="pip install 'gcvit[onnx]'"
        )
    if target.exists():
        raise UserError("something is there already", got=target, hint="give another name, or move it away")
    part = target.with_name(f"{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()  # a place that cannot be written fails here, before the minutes of the export
        num_bytes = _write(classifier, part)
        difference = compare(classifier, part)
        part.rename(target)
    except OSError as error:
        raise UserError("cannot write the model", got=f"{target} ({error})", hint="give another place") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    batches = " and ".join(map(str, CHECKED_BATCHES))
    return (
        f"{target}: {len(classifier.classes)} classes, {num_bytes / 1e6:.1f} MB\n"
        f"onnxruntime's logits differ from torch's by {difference:.1e} at most, in batches of {batches}"
    )


def _write(classifier: Classifier, path: Path) -> int:
    model, data = classifier.model, classifier.data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own future
        program = torch.onnx.export(
            model,
            (torch.zeros(2, *model.input_size),),  # a batch of one would be taken for a constant
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
        )
    assert program is not None
    preparation = data.model_dump(mode="json", include={"crop_pct", "eval_resize", "mean", "std"})
    card = {"img_size": model.img_size, **preparation, "classes": classifier.classes}
    program.model.metadata_props["gcvit"] = json.dumps(card)
    program.save(path, external_data=False)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


@torch.no_grad()
def compare(classifier: Classifier, path: Path) -> float:
    """Compute the largest difference of onnxruntime's logits from torch's, on random images.

    Raises:
        UserError: The difference exceeds `MAX_DIFFERENCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch_size in CHECKED_BATCHES:
        images = torch.randn(batch_size, *classifier.model.input_size, generator=generator)
        expected = classifier.model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        difference = (found - expected).abs().max().item()
        if not difference <= MAX_DIFFERENCE * max(1.0, expected.abs().max().item()):  # nor NaN
            raise UserError(
                "onnxruntime computes other logits than torch",
                got=f"a difference of {difference:.1e} in a batch of {batch_size}",
                expected=MAX_DIFFERENCE,
                hint="try other releases of onnxruntime and onnxscript: constraints.txt has those that were tested",
            )
        worst = max(worst, difference)
    return worst


def main() -> None:
    parser = command_parser("gcvit.export.onnx_export", "SRC DST [flags]", __doc__)
    add = parser.add_argument_group("what, and where to").add_argument
    add("source", metavar="SRC", help="a run, a checkpoint, an export, a weights file or a variant")
    add("target", metavar="DST", type=Path, help="file to make")
    add("--model", metavar="NAME", help="the variant of a file (read from the shapes)")
    arguments = parser.parse_args()
    classifier = open_classifier(arguments.source, arguments.model, attention="reference")
    print(classifier.origin, flush=True)
    print(export_onnx(classifier, arguments.target), flush=True)


if __name__ == "__main__":
    run_main(main)
