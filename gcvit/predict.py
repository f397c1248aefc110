"""What is on these images? The likeliest classes of each, by their names.

    python -m gcvit.predict cat.jpg dog.jpg --checkpoint gc_vit_tiny
    python -m gcvit.predict photos --checkpoint runs/gc_vit_tiny --top 1
    python -m gcvit.predict cat.jpg --checkpoint gcvit_1k_tiny.pth.tar --json

--checkpoint is a run, a checkpoint or an export of ours; a weights file of any layout, whose variant its shapes tell;
or the name of a variant, whose published weights are fetched (CC-BY-NC-SA-4.0). Images are prepared as evaluation does,
and shown as they come, a batch at a time. A run knows the names of its classes; 1000 classes of others are ImageNet's.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcvit.checkpoint.weights_source import Classifier, open_classifier
from gcvit.data.decode import DecodeError
from gcvit.data.image_files import SUFFIXES, has_image_suffix, walk_files
from gcvit.data.transforms import EvalTransform, normalize
from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser
from gcvit.runtime.entrypoint import run_main


def list_images(places: Sequence[Path]) -> list[Path]:
    """List the files among these places, and the images in and below the folders among them, sorted.

    Raises:
        UserError: A folder holds no images.
    """
    images: list[Path] = []
    for place in places:
        if not place.is_dir():
            images.append(place)
            continue
        found = sorted(place / path for path in walk_files(place) if has_image_suffix(path))
        if not found:
            raise UserError("a folder without images", got=place, expected=", ".join(f"*{end}" for end in SUFFIXES))
        images += found
    return images


@torch.no_grad()
def predict(
    classifier: Classifier, images: Sequence[Path], batch_size: int, device: torch.device
) -> Iterator[tuple[Path, Tensor]]:
    """Yield each image with the probabilities of all classes, (C,) in fp32 on the CPU.

    Raises:
        UserError: An image cannot be read.
    """
    model, data = classifier.model.to(device), classifier.data
    assert isinstance(model.img_size, int), "neither a config nor a file's shapes tell of rectangles"
    transform = EvalTransform(data, model.img_size)
    for begin in range(0, len(images), batch_size):
        paths = images[begin : begin + batch_size]
        pixels = torch.stack([_read_image(path, transform) for path in paths])
        logits = model(normalize(pixels.to(device), data.mean, data.std))
        yield from zip(paths, logits.softmax(dim=1).cpu(), strict=True)


def _read_image(path: Path, transform: EvalTransform) -> Tensor:
    try:
        return transform(path.read_bytes())
    except OSError as error:
        raise UserError("cannot read an image", got=f"{path} ({error.strerror})") from None
    except DecodeError as error:
        raise UserError("not an image that can be read", got=f"{path} ({error})") from None


def describe(path: Path, probabilities: Tensor, classes: Sequence[str], top: int, as_json: bool) -> str:
    """Describe the likeliest classes of an image: as lines for people, or as a line of JSON."""
    likeliest = probabilities.topk(min(top, len(classes)))
    rows = list(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
    if as_json:
        found = [{"label": label, "name": classes[label], "probability": share} for label, share in rows]
        return json.dumps({"image": str(path), "classes": found})
    return "\n".join([str(path), *(f"  {100 * share:6.2f} %  {classes[label]}" for label, share in rows)])


def main() -> None:
    parser = command_parser("gcvit.predict", "IMAGE... --checkpoint RUN|FILE|NAME [flags]", __doc__)
    add = parser.add_argument_group("what, and with what").add_argument
    add("images", metavar="IMAGE", nargs="+", type=Path, help="files, or folders of them")
    add("--checkpoint", metavar="RUN|FILE|NAME", required=True, help="what to predict with")
    add("--model", metavar="NAME", help="the variant of a file (read from the shapes)")
    add("--batch-size", metavar="N", type=int, default=32, help="images at once (32)")
    add = parser.add_argument_group("what is shown").add_argument
    add("--top", metavar="K", type=int, default=5, help="classes of each image (5)")
    add("--json", action="store_true", help="one line of JSON for each image")
    arguments = parser.parse_args()
    check_at_least_one(top=arguments.top, batch_size=arguments.batch_size)
    images = list_images(arguments.images)
    classifier = open_classifier(arguments.checkpoint, arguments.model)
    print(classifier.origin, file=sys.stderr, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for path, probabilities in predict(classifier, images, arguments.batch_size, device):
        print(describe(path, probabilities, classifier.classes, arguments.top, arguments.json), flush=True)


if __name__ == "__main__":
    run_main(main)
