"""A rank of a training whose micro-batch is found on devices of unlike memory.

`micro_batch_worker.py LIMIT... -- WORDS`: bytes by rank, or "none"; the words are train.py's.
"""

import os
import sys

import train
from gcvit.planning import micro_batch_finder
from gcvit.runtime.entrypoint import run_main
from tests.helpers.limited_device import Limited


def main() -> None:
    place = sys.argv.index("--")
    limit = sys.argv[1:place][int(os.environ.get("RANK", 0))]
    if limit != "none":
        step = micro_batch_finder.Trial._step

        def limited_step(trial: micro_batch_finder.Trial, num_images: int) -> None:
            trial._forecast.predict(trial._config, trial._world.size, num_images)  # which takes no memory itself
            with Limited(float(limit)):
                step(trial, num_images)

        micro_batch_finder.Trial._step = limited_step  # type: ignore[method-assign]
    sys.argv = ["train.py", *sys.argv[place + 1 :]]
    train.main()


run_main(main)
