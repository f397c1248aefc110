import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gcvit.report.charts import thin

values = st.one_of(st.floats(-1e6, 1e6), st.just(math.nan))


@given(y=st.lists(values, min_size=1, max_size=200), max_points=st.integers(1, 60))
def test_what_is_drawn_stands_for_all_rows(y, max_points):
    y = np.array(y)
    x = np.arange(len(y), dtype=float)
    thinned = thin(x, y, max_points)
    num_points = len(thinned.x)
    assert num_points <= max_points or thinned.rows_per_point == 1
    assert num_points == len(thinned.mean) == len(thinned.low) == len(thinned.high)
    assert thinned.x[-1] == x[-1]
    finite = y[np.isfinite(y)]
    if len(finite):
        assert np.nanmin(thinned.low) == finite.min()
        assert np.nanmax(thinned.high) == finite.max()
    for point in range(num_points):
        rows = y[point * thinned.rows_per_point : (point + 1) * thinned.rows_per_point]
        rows = rows[np.isfinite(rows)]
        if len(rows):
            assert math.isclose(thinned.mean[point], rows.mean(), rel_tol=1e-9, abs_tol=1e-6)
            assert (thinned.low[point], thinned.high[point]) == (rows.min(), rows.max())
        else:
            assert math.isnan(thinned.mean[point])


def test_few_rows_are_drawn_as_they_are():
    y = np.array([3.0, math.nan, 1.0])
    thinned = thin(np.arange(3.0), y, max_points=3)
    assert thinned.rows_per_point == 1
    np.testing.assert_array_equal(thinned.mean, y)
