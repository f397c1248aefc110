"""Profile the steps after START (`trainer.profile=START:STEPS`) into RUN/profile, a set of files for each rank.

- trace_rankR.json.gz: all operations on a time line, for https://ui.perfetto.dev or chrome://tracing.
- operations_rankR.txt: the operations that took most time, and those that took most memory.
- memory_rankR: on a GPU a snapshot of its memory's blocks with their stacks, for https://pytorch.org/memory_viz
  (.pickle: torch writes it so, and nothing here reads it); on a CPU its use over time, [[microseconds, bytes], ...].
"""

import gzip
import json
import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gcvit.config.schema import TrainerConfig
from gcvit.errors import UserError
from gcvit.runtime.distributed import World

logger = logging.getLogger(__name__)

_NUM_ROWS = 40
_MAX_EVENTS = 200_000  # of a memory snapshot


class Profiler:
    """Profiles some steps of a run, whose START counts finished steps. Every rank has one.

    Raises:
        UserError: START is not below the run's `num_steps`.
    """

    def __init__(self, trainer: TrainerConfig, folder: Path, world: World, num_steps: int):
        self._folder, self._world = folder, world
        self._first, self._last = trainer.profiled_steps or (-1, -1)
        if self._first >= num_steps:
            raise UserError(
                "trainer.profile begins where the run has ended",
                got=trainer.profile,
                expected=f"START below {num_steps}",
                hint="choose an earlier step",
            )
        self._profile: profile | None = None
        self._step = 0

    def step(self, step: int) -> None:
        """Begin or end the profile if it is due; called between steps, with the number of finished ones."""
        self._step = step
        if step == self._first and self._profile is None:
            self._begin()
        elif step >= self._last:
            self.close()

    def close(self) -> None:
        """Write the profile, if one was begun."""
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        profiled.stop()
        name = f"rank{self._world.rank}"
        trace = self._folder / f"trace_{name}.json.gz"
        profiled.export_chrome_trace(str(trace))
        where = "cuda" if self._world.device.type == "cuda" else "cpu"
        averages = profiled.key_averages()
        tables = [
            averages.table(f"self_{where}_{what}", row_limit=_NUM_ROWS) for what in ("time_total", "memory_usage")
        ]
        (self._folder / f"operations_{name}.txt").write_text("\n".join(tables))
        if where == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            (self._folder / f"memory_{name}.json").write_text(json.dumps(read_memory_use(trace)))
        logger.info(f"profile of steps {self._first + 1} to {self._step}: {self._folder}")

    def _begin(self) -> None:
        self._folder.mkdir(exist_ok=True, parents=True)
        on_cuda = self._world.device.type == "cuda"
        if on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()


def read_memory_use(trace: Path) -> list[tuple[float, int]]:
    """Read a trace's (microseconds, allocated bytes) after each allocation and release."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    seen = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"]
    begin = min((time for time, _ in seen), default=0.0)
    return [(round(time - begin, 3), num_bytes) for time, num_bytes in sorted(seen)]
