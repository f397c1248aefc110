"""What shows only in processes of their own: a held lock, a log file and a terminal, the limit of open files."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

from gcvit.runtime.run_lock import RunLock
from tests.helpers.launching import ROOT, environment, python, succeed
from tests.helpers.streaming import NUM_TRAIN
from tests.unit.data.conftest import write_images

HOLD = """
import sys, time
from pathlib import Path
from gcvit.runtime.entrypoint import run_main
from gcvit.runtime.run_lock import RunLock

def main():
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))

run_main(main)
"""

STEPS = """
import logging, sys, torch
from gcvit.config.load import load_config
from gcvit.monitoring.metric_logger import MetricLogger
from gcvit.parallel.engine import StepResult
from gcvit.runtime.distributed import join_world
from gcvit.runtime.log import log_to
from gcvit.monitoring.step_timer import Seconds

config, _ = load_config("tests/helpers/golden.yaml", ["output_dir=" + sys.argv[1]])
config.run_dir.mkdir()
result = StepResult(torch.tensor(0.5), torch.tensor(1.0))
with join_world() as world, log_to(None, world.rank):
    metrics = MetricLogger(config, world, first_step=5, total_steps=20)
    logging.getLogger("gcvit.training").info("a word")
    for step in range(6, 21):
        metrics.add(torch.tensor(64.0), torch.tensor(8), result)
    metrics.log_step(20, 1e-3, result, Seconds({"compute": 1.0}), num_corrupt=0)
    metrics.close()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run_dir), "100"]
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        holder = json.loads((run_dir / "lock").read_text())
        assert holder["pid"] == first.pid

        second = python("-c", HOLD, run_dir, 0, timeout=60)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.startswith("error: the run folder is in use by a live run: got ")
        assert str(first.pid) in second.stderr
        assert "hint: " in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert json.loads((run_dir / "lock").read_text()) == holder, "the loser must not sign the winner's lock"

        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with RunLock(run_dir):
            assert json.loads((run_dir / "lock").read_text())["pid"] == os.getpid()
    finally:
        first.kill()
        first.wait()


def run_steps(tmp_path: Path, stderr: int) -> None:
    command = [sys.executable, "-c", STEPS, str(tmp_path)]
    on_cpu = environment(CUDA_VISIBLE_DEVICES="")  # the script's tensors are there
    subprocess.run(command, cwd=ROOT, env=on_cpu, stderr=stderr, check=True, timeout=120)


def test_a_log_file_gets_lines_without_control_characters(tmp_path):
    path = tmp_path / "log"
    with open(path, "wb") as file:
        run_steps(tmp_path, file.fileno())
    text = path.read_bytes().decode()
    assert all(character == "\n" or character.isprintable() for character in text), text
    lines = [line.partition(" rank 0 INFO: ")[2] for line in text.splitlines() if " rank 0 INFO: " in line]
    assert lines[0] == "a word"
    assert lines[1].startswith("step 20/20  loss 2.0000  lr 0.001  norm 0.5  ")


def test_a_terminal_gets_a_bar_and_the_same_lines(tmp_path):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    try:
        run_steps(tmp_path, stderr)  # so little that it fits the terminal's buffer
        text = os.read(terminal, 65536).decode()
    finally:
        os.close(stderr)
        os.close(terminal)
    assert "\r" in text
    assert "| 5/20" in text
    assert "| 20/20" in text
    assert " rank 0 INFO: a word\r\n" in text
    assert "step 20/20  loss 2.0000" in text


def test_a_step_of_many_pieces_takes_few_file_descriptors(tmp_path):
    """A recipe's step on one GPU is 64 micro-batches of 8 pieces; the usual limit is 1024 descriptors."""
    write_images(tmp_path / "train", NUM_TRAIN)
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
from pathlib import Path
from gcvit.data.source import open_source
from tests.helpers.streaming import make_config, take_steps

if __name__ == "__main__":
    source = open_source(Path({root!r}), "train")
    (step,) = take_steps(source, make_config(128, num_workers=4), 1, micro_batch_size=4)
    assert len(step) == 32 and sum(len(batch.labels) for batch in step) == 128
"""
    succeed(python("-c", script.format(root=str(tmp_path))))


def test_a_loader_takes_no_notice_and_yet_obeys_its_trainer(tmp_path):
    """SLURM tells every process of a job to leave; the last steps still need the loaders."""
    write_images(tmp_path / "train", NUM_TRAIN)
    script = """
import multiprocessing, subprocess
from pathlib import Path
from gcvit.data.batch_plan import BatchPlan
from gcvit.data.source import open_source
from gcvit.data.loader import train_stream
from tests.helpers.streaming import make_config

if __name__ == "__main__":
    source, config = open_source(Path({root!r}), "train"), make_config(8, num_workers=1)
    batch_plan = BatchPlan.from_config(config, world_size=1, micro_batch_size=None)
    stream = train_stream(source, config, batch_plan, start_step=0, rank=0, pin_memory=False)
    next(stream)
    (loader,) = multiprocessing.active_children()
    for name in ("-USR1", "-TERM"):
        subprocess.run(["kill", name, str(loader.pid)], check=True)
    for _ in range(20):
        next(stream)
    loader.terminate()
    loader.join(60)
    assert loader.exitcode == 1, loader.exitcode
"""
    succeed(python("-c", script.format(root=str(tmp_path))))


def test_a_loader_that_is_stuck_is_left_behind_whatever_signals_rain(tmp_path):
    """Of two SIGTERMs that wait at once the system keeps one: the trainer's may be the one that it drops."""
    (tmp_path / "stuck.py").write_text("""
import os, subprocess, sys, time
from gcvit.data.worker_process import loader_context, start_worker

RAIN = "import os, sys, itertools; [os.kill(int(sys.argv[1]), 15) for _ in itertools.count()]"

def load(pipe):
    start_worker(0)
    pipe.send(os.getpid())
    time.sleep(1000)

if __name__ == "__main__":
    context = loader_context()
    here, there = context.Pipe()
    context.Process(target=load, args=(there,), daemon=True).start()
    loader = here.recv()
    subprocess.Popen([sys.executable, "-c", RAIN, str(loader)], stderr=subprocess.DEVNULL)
    time.sleep(1)
    print("the end", flush=True)
""")
    done = python(tmp_path / "stuck.py", timeout=60)
    assert (done.returncode, done.stdout) == (0, "the end\n"), done.stderr
