"""train.py with what tests need: slow steps and saves, and a rank that raises. It stands in for it in a job's folder.

STEP_SECONDS, SAVE_SECONDS: how much longer a step, and the writing of a checkpoint take. RAISE: "RANK:STEP:RESTART",
the rank that raises instead of doing that step, in that start of the job.
"""

import importlib.util
import os
import time
from pathlib import Path

from gcvit.runtime.entrypoint import run_main

spec = importlib.util.spec_from_file_location("true_train", Path(__file__).resolve().parents[3] / "train.py")
true_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(true_train)
parse_arguments = true_train.parse_arguments  # for the pre-flight
step_seconds, save_seconds = (float(os.environ.get(name, 0)) for name in ("STEP_SECONDS", "SAVE_SECONDS"))
raises = os.environ.get("RAISE")


def main():
    from gcvit.checkpoint.writer_process import WriterProcess
    from gcvit.training.trainer import Trainer

    train_step, write = Trainer.train_step, WriterProcess.write

    def write_late(*arguments):
        record = write(*arguments)
        time.sleep(save_seconds)
        return record

    def disturbed_train_step(trainer, batches):
        time.sleep(step_seconds)
        if f"{trainer.world.rank}:{trainer.state.step}:{os.environ.get('SLURM_RESTART_COUNT', 0)}" == raises:
            raise ArithmeticError("a step that cannot be done")
        return train_step(trainer, batches)

    Trainer.train_step, WriterProcess.write = disturbed_train_step, write_late
    true_train.main()


if __name__ == "__main__":
    run_main(main)
