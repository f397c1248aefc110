"""Settings for all tests; what several test files need lies beside them, not here."""

import os

from hypothesis import settings

# Before torch is imported: one thread per process, so that sums keep their order and processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run and no clock: what failed fails again, and a loaded machine fails nothing.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("repeatable")
