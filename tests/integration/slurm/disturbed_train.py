"""train.py with what tests need: slow steps, and a rank that raises. It stands in for train.py in a job's folder.

STEP_SECONDS: how much longer a step takes. RAISE: "RANK:STEP:RESTART", the rank that raises instead of doing that
step, in that start of the job.
"""

import importlib.util
import os
import time
from pathlib import Path

from gcvit.errors import run_main

spec = importlib.util.spec_from_file_location("true_train", Path(__file__).resolve().parents[3] / "train.py")
true_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(true_train)
parse_arguments = true_train.parse_arguments  # for the pre-flight
seconds, raises = float(os.environ.get("STEP_SECONDS", 0)), os.environ.get("RAISE")


def main():
    from gcvit import trainer

    take_step = trainer.take_step

    def take_disturbed_step(run, batches):
        time.sleep(seconds)
        if f"{run.world.rank}:{run.state.step}:{os.environ.get('SLURM_RESTART_COUNT', 0)}" == raises:
            raise ArithmeticError("a step that cannot be done")
        return take_step(run, batches)

    trainer.take_step = take_disturbed_step
    true_train.main()


if __name__ == "__main__":
    run_main(main)
