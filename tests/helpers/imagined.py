"""Make a step's record without a step, for tests of code that reads one; it needs no time."""

from gcvit.model import GCViT
from gcvit.planning.step_trace import ROOT, Event

BYTES = 1000
"""Of an image, kept by each part for backward; while a part computes, it takes as much again."""


def imagine(model: GCViT, num_images: int, kept: int = BYTES) -> list[Event]:
    """Make the events of a micro-batch: each part stores its bytes, and frees them in backward."""
    parts, size = model.cut_points(), num_images * kept
    names = {part: [n for n, _ in model.named_parameters() if n.startswith(f"{part}.")] for part in parts}
    of_root = [n for n, _ in model.named_parameters() if not any(n in own for own in names.values())]
    events = [Event(0, "forward", ROOT)]
    for part in parts:
        events += [Event(0, "forward", part), Event(2 * size), Event(-size), Event(0, "forwarded", part)]
    events += [Event(0, "loss"), Event(0, "backward", ROOT), *(Event(0, "gradient", n) for n in of_root)]
    for part in reversed(parts):
        events += [Event(0, "backward", part), *(Event(0, "gradient", n) for n in reversed(names[part]))]
        events += [Event(-size), *([] if part == "stem" else [Event(0, "backwarded", part)])]
    return [*events, Event(0, "end")]
