"""Jobs that are warned, preempted, cancelled, cut off from power, or whose processes raise, hang or are killed.

Steps are slow, so that there is time to do it. Whatever happened, a run must end as the one that nobody disturbed:
with the same bits on as many nodes.
"""

import random
import re

import pytest
import torch

from gcvit.checkpoint.store import open_checkpoint, read_tensors
from tests.integration.slurm.cluster import Cluster, Job, losses, wait_for

STEPS = 20
OPTIONS = [
    *("data.num_workers=0", "data.lanes=4", "global_batch_size=24", f"schedule.cosine={STEPS} steps"),
    *("trainer.log_every=1 step", "trainer.save_every=4 steps", "trainer.eval_every=20 steps", "model.num_classes=10"),
]
ENGINES = {"fsdp": ["engine=fsdp", "fsdp.unit_parameters=10000"], "zero": ["engine=zero", "zero.stage=2"]}
KINDS = ("model", "exp_avg", "exp_avg_sq", "ema")


class Runs:
    def __init__(self, cluster: Cluster, data: str):
        self.cluster, self.data, self.folder = cluster, data, cluster.root / "disturbed"

    def submit(self, tag: str, engine: str, *flags: str, overrides: tuple[str, ...] = (), **variables: str) -> Job:
        words = [
            "--data_dir",
            self.data,
            "--tag",
            tag,
            f"output_dir={self.folder}",
            *OPTIONS,
            *ENGINES[engine],
            *overrides,
        ]
        command = [*(flags or ("--nodes=2",)), "launch/train.sbatch", "tests/helpers/golden.yaml", *words]
        return self.cluster.submit(*command, **{"STEP_SECONDS": "0.3", **variables})

    def is_saving(self, tag: str) -> bool:
        return any((self.folder / tag / "checkpoints").glob("step_*.tmp"))

    def tensors(self, tag: str) -> dict[str, torch.Tensor]:
        found = open_checkpoint(self.folder / tag / f"checkpoints/step_{STEPS:08d}")
        return {f"{kind}.{name}": t for kind in KINDS for name, t in read_tensors(found, kind).items()}

    def check_equal(self, tag: str, whole: str) -> None:
        """Bit-equal at the end, and so are all losses."""
        found, wanted = self.tensors(tag), self.tensors(whole)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        assert losses(self.folder / tag) == losses(self.folder / whole)
        assert not list((self.folder / tag / "checkpoints").glob("*.tmp"))

    def check_near(self, tag: str, whole: str) -> None:
        """With the losses of another number of ranks: other sums."""
        found, wanted = losses(self.folder / tag), losses(self.folder / whole)
        assert len(found) == STEPS
        assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-4)


def numbers_of_nodes(job: Job) -> list[int]:
    """Of each start."""
    return [int(number) for number in re.findall(r"restart \d+: train.py on (\d) x 1 processes", job.log)]


@pytest.fixture(scope="session")
def runs(cluster, digits) -> Runs:
    return Runs(cluster, str(digits / "shards"))


@pytest.fixture(scope="session")
def whole(runs) -> dict[str, str]:
    """Tags of the runs that nobody disturbs."""
    for engine in ENGINES:
        runs.submit(engine, engine, STEP_SECONDS="0").complete()
    return {engine: engine for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_warning_at_random_moments(runs, whole, engine):
    """Five in each engine: in steps, with a save in flight, and one before Python has its handler."""
    chance = random.Random(engine)
    launcher = {"LAUNCHER": "deepspeed"} if engine == "zero" else {}
    job = runs.submit(f"warned-{engine}", engine, STEP_SECONDS="0.4", SAVE_SECONDS="0.7", **launcher)
    start, step = 0, 0
    for number in range(5):
        if number == 2:
            job.wait_for_log(rf"restart {number}: ", start=start)
        elif number % 2:
            job.wait_for_log(r"step \d+/20 +loss", start=start)
            wait_for(lambda: runs.is_saving(f"warned-{engine}"), 30)
        else:
            job.wait_for_log(rf"step {min(step + chance.randint(1, 2), STEPS - 1)}/{STEPS} +loss", start=start)
        start = len(job.log)
        job.warn()
        job.wait_for_log(r"requeued\n", start=start)
        told = re.findall(r"preempted: (?:rank \d on node\d|before)(?:, after step (\d+))?", job.log[start:])
        assert len(told) == 1, job.log[start:]
        step = int(told[0] or step)
        start = len(job.log)
    job.complete(restarts=5)
    runs.check_equal(f"warned-{engine}", engine)


def test_preempted_by_a_job_that_keeps_a_node(runs, whole):
    """It goes on with those that are left."""
    job = runs.submit("preempted", "fsdp", "--nodes=2-3")
    job.wait_for_log(rf"step 6/{STEPS} +loss")
    urgent = runs.cluster.submit("--nodes=1", "--partition=lab-high", "--wrap", "sleep 300")
    job.complete(restarts=1)
    assert "preempted: rank" in job.log
    assert numbers_of_nodes(job) == [3, 2]
    assert urgent.show()["JobState"] == "RUNNING"
    runs.check_near("preempted", whole["fsdp"])


def test_a_chain_of_jobs_finishes_what_one_cannot(runs, whole):
    """Where jobs are not requeued: each goes on from where the one before was warned."""
    options = ["--nodes=2", "--no-requeue", "--job-name=chain", "--dependency=singleton"]
    chain = [runs.submit("chain", "fsdp", *options) for _ in range(3)]
    for job, step in zip(chain, (7, 13), strict=False):
        job.wait_for_log(rf"step {step}/{STEPS} +loss")
        job.warn()
        assert job.end()["ExitCode"] == "75:0"
        assert "submit it again" in job.log
    chain[-1].complete()
    runs.check_equal("chain", "fsdp")


def test_one_that_ignores_the_warning_goes_on_from_its_last_checkpoint(runs, whole):
    """Another signal is the warning, one without effect; killed at the end of the grace time."""
    job = runs.submit("deaf", "fsdp", "--nodes=2", "--signal=B:URG@1", STEP_SECONDS="1.5")
    job.wait_for_log(rf"step 4/{STEPS} +saved")
    urgent = runs.cluster.submit("--nodes=3", "--partition=lab-high", "--wrap", "srun sleep 1")
    urgent.complete()
    job.complete(restarts=1)
    assert re.search(r"from step [1-9]", job.log.split("restart 1:")[1])
    runs.check_equal("deaf", "fsdp")


def test_a_cancelled_job_stays_so(runs):
    job = runs.submit("cancelled", "fsdp")
    job.wait_for_log(rf"step 5/{STEPS} +loss")
    runs.cluster.run("scancel", job.number)
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    wait_for(lambda: not runs.cluster.run("squeue", "-h").strip(), 60)
    assert "requeued\n" not in job.log


@pytest.mark.parametrize("node", ["node1", "node3"])
def test_a_power_cut(runs, whole, node):
    """Of the node with the batch script and rank 0, and of another; goes on with the two that are left."""
    tag = f"cut-{node}"
    slow = {} if node == "node1" else {"SAVE_SECONDS": "1"}
    job = runs.submit(tag, "fsdp", "--nodes=2-3", **slow)
    job.wait_for_log(rf"step {6 if node == 'node1' else 8}/{STEPS} +loss")
    if node != "node1":  # in mid-save
        wait_for(lambda: runs.is_saving(tag), 20)
    runs.cluster.call("kill", node)
    job.complete(restarts=1)
    assert re.search(r"from step [1-9]", job.log)
    assert numbers_of_nodes(job) == [3, 2]
    runs.check_near(tag, whole["fsdp"])


def test_a_rank_that_raises_is_named_and_the_job_starts_again(runs, whole):
    """With the shards staged to each node's own /dev/shm, where the second start finds them."""
    stage = {"overrides": ("--stage", runs.data), "SCRATCH": "/dev/shm"}
    job = runs.submit("raised", "fsdp", RAISE="1:6:0", **stage).complete(restarts=1)
    assert re.search(r"crashed: rank 1 on node2, after step 6: ArithmeticError: a step that cannot be done", job.log)
    runs.check_equal("raised", "fsdp")
    place = r"/dev/shm/shards-[0-9a-f]{8}"
    staged = re.findall(rf"(node\d): all (\d+) shards are in {place}, (\d+) of them copied now", job.log)
    (num_shards,) = {num for _, num, _ in staged}
    assert sorted(staged[:2]) == [("node1", num_shards, num_shards), ("node2", num_shards, num_shards)]
    assert sorted(staged[2:]) == [("node1", num_shards, "0"), ("node2", num_shards, "0")]


def test_a_rank_that_is_killed_is_named_and_so_is_one_that_hangs(runs):
    """One of two on its node, as by the system for its memory; stopped, it says nothing itself. After two restarts
    there is no third."""
    settings = {"MAX_RESTARTS": "2", "STEP_SECONDS": "0.6", "TASKS_PER_NODE": "2"}
    job = runs.submit("killed", "fsdp", overrides=("trainer.hang_timeout=8",), **settings)
    job.wait_for_log(rf"step 5/{STEPS} +loss")
    job.signal_rank("node2", "KILL", 3)
    job.wait_for_log(r"killed by SIGKILL: rank 3 on node2; out of memory")
    job.wait_for_log(r"restart 1: ")
    start = len(job.log)
    job.wait_for_log(rf"step \d+/{STEPS} +loss", start=start)
    job.signal_rank("node2", "STOP", 3)
    job.wait_for_log(r"hung: rank \d on node\d.*the cause may be rank 3 on node2", start=start)
    assert re.search(r"\[rank 0 on node1\].*the stacks of all threads", job.log)
    start = len(job.log)
    job.wait_for_log(r"restart 2: [\s\S]*step \d+/20 +loss", start=start)
    job.signal_rank("node2", "KILL", 3)
    job.wait_for_log("not requeued: 2 restarts after failures")
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("FAILED", "2", "1:0")


def test_what_a_restart_cannot_mend_is_not_tried_again(runs):
    job = runs.submit("mistaken", "fsdp", overrides=("optim.lrr=1",))
    shown = job.end()
    assert (shown["JobState"], shown["Restarts"], shown["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "optim.lrr" in job.log.splitlines()[-1]


def test_preflight_names_a_bad_node_and_the_restart_does_without_it(runs):
    """node2 lost its data folder: it is excluded, and the job goes on with the others."""
    runs.cluster.call("exec", "-n", "node2", "mount", "-t", "tmpfs", "tmpfs", runs.data)
    try:
        job = runs.submit("preflight", "fsdp", PREFLIGHT="on").complete(restarts=1)
    finally:
        runs.cluster.call("exec", "-n", "node2", "umount", runs.data)
    assert re.search(r"bad node node2: does not see", job.log)
    assert "2 x 1 processes with 8 CPUs each: node1 node3" in job.log
    for pattern in (r"all-reduce over 2 x cpu: [\d.]+ GB/s", r"room for \d+ checkpoints", r"a shard is read with"):
        assert re.search(pattern, job.log)
