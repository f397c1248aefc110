"""Write scikit-learn's handwritten digits as class folders of JPEGs: `python -m data_prep.digits OUT`.

1,797 real scans of 8 × 8 grey levels (Optical Recognition of Handwritten Digits, UCI; bundled with
scikit-learn), scaled to 64 × 64 and written as OUT/{train,val}/{0..9}/NNNN.jpg, where NNNN is the scan's index in
the data set: 1,437 to train on and 360 held out. digits_split.json lists those held out, so that accuracies stay
comparable; `draw_val` drew that list.
"""

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from gcvit.errors import UserError
from gcvit.runtime.command_line import command_parser
from gcvit.runtime.entrypoint import run_main

SPLIT_FILE = Path(__file__).with_name("digits_split.json")
NUM_VAL = 360
SEED = 0
SIDE_PIXELS = 64
JPEG_QUALITY = 92
WHITE = 16  # the scans hold 0 (paper) to 16 (ink)


def draw_val(labels: np.ndarray, num_val: int = NUM_VAL, seed: int = SEED) -> list[int]:
    """Draw `num_val` indices into `labels` (N,), each class in proportion, sorted.

    Shares are rounded by largest remainder (the lower class wins a tie), so that each class is within one of
    its exact share. RandomState, since NumPy promises that its stream never changes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = [Fraction(int(count) * num_val, len(labels)) for count in counts]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(classes)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: num_val - sum(quotas)]:
        quotas[i] += 1
    random = np.random.RandomState(seed)
    drawn: list[int] = []
    for label, quota in zip(classes, quotas, strict=True):
        drawn += random.permutation(np.flatnonzero(labels == label))[:quota].tolist()
    return sorted(drawn)


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scans (1797, 8, 8), 0 to 16, and labels (1797,).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits come with scikit-learn, which is missing", hint="pip install scikit-learn"
        ) from None
    digits = load_digits()
    return digits.images, digits.target


def encode_scan(scan: np.ndarray) -> bytes:
    """Encode one scan (8, 8) as a grey JPEG of 64 × 64 pixels; one release of Pillow gives equal bytes."""
    pixels = np.rint(scan * (255 / WHITE)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def make_tree() -> dict[str, bytes]:
    """Encode all scans as a tree of class folders (2 MB).

    Returns:
        JPEG bytes by relative path, {train,val}/{0..9}/NNNN.jpg.

    Raises:
        UserError: scikit-learn is not installed.
    """
    scans, labels = load_scans()
    val = set(json.loads(SPLIT_FILE.read_text())["val"])
    return {
        f"{'val' if index in val else 'train'}/{label}/{index:04d}.jpg": encode_scan(scan)
        for index, (scan, label) in enumerate(zip(scans, labels, strict=True))
    }


def write_tree(out: Path, files: dict[str, bytes]) -> int:
    """Write the missing ones of `files` under `out`, and return their number. Existing files are never changed.

    Raises:
        UserError: `out` holds anything but these files with these bytes; nothing was written.
    """
    if out.exists() and not out.is_dir():
        raise UserError("cannot write the digits there", got=f"{out}, a file", expected="a folder, new or empty")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    for name in sorted(present):
        if name not in files or (out / name).read_bytes() != files[name]:
            raise UserError(
                "the folder holds other files than these digits, which are not overwritten",
                got=out / name,
                expected="a folder that is new, empty or this command's own",
                hint="name another folder, or remove this one",
            )
    missing = sorted(files.keys() - present)
    try:
        for name in missing:
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
    except OSError as error:
        raise UserError("cannot write the digits", got=f"{out} ({error.strerror})") from None
    return len(missing)


HELP = """Write the demo's images: scikit-learn's handwritten digits as class folders of JPEGs.

    python -m data_prep.digits data/digits/raw
"""


def main() -> None:
    parser = command_parser("data_prep.digits", "OUT", HELP)
    add = parser.add_argument_group("where to").add_argument
    add("out", metavar="OUT", type=Path, help="folder to write: new, empty or this command's own")
    out = parser.parse_args().out
    files = make_tree()
    num_written = write_tree(out, files)
    num_val = sum(name.startswith("val/") for name in files)
    print(f"{out}: {len(files) - num_val} train and {num_val} val images, {num_written} of them written now")


if __name__ == "__main__":
    run_main(main)
