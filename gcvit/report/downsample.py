"""Long columns made short enough to draw, without hiding anything: each point stands for a range, and says which."""

from dataclasses import dataclass

import numpy as np

from gcvit.report.run_data import Numbers

MAX_POINTS = 500
"""Of a curve: about one for each pixel of a phone, one for each two of a screen."""


@dataclass(frozen=True)
class Thinned:
    """Points of consecutive rows; all arrays are (P,), NaN where none of a point's rows holds a number."""

    x: Numbers
    """Of the last of the point's rows."""
    mean: Numbers
    low: Numbers
    high: Numbers
    rows_per_point: int
    """1: every row is drawn as it is."""


def thin(x: Numbers, y: Numbers, max_points: int = MAX_POINTS) -> Thinned:
    """At most `max_points` points: the mean of equally many consecutive rows, with the least and the greatest."""
    rows_per_point = max(1, -(-len(y) // max_points))
    if rows_per_point == 1:
        return Thinned(x, y, y, y, 1)
    begins = np.arange(0, len(y), rows_per_point)
    ends = np.minimum(begins + rows_per_point, len(y))
    is_number = np.isfinite(y)
    nums = np.add.reduceat(is_number.astype(np.float64), begins)
    sums = np.add.reduceat(np.where(is_number, y, 0.0), begins)
    mean = np.divide(sums, nums, out=np.full(len(begins), np.nan), where=nums > 0)
    # fmin and fmax pass over NaN where there is anything else.
    return Thinned(x[ends - 1], mean, np.fmin.reduceat(y, begins), np.fmax.reduceat(y, begins), rows_per_point)
