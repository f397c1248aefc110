"""Jobs that nobody disturbs: training and evaluation on two and three nodes, sharding, options, devices, ssh."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gcvit.checkpoint.store import open_checkpoint, read_tensors
from tests.helpers.launching import ROOT, python, succeed
from tests.integration.slurm.cluster import Cluster, Job, losses, wait_for

STEPS = 20
CONFIG = "configs/digits_demo.yaml"
OPTIONS = [
    # Drop path is drawn by each rank.
    *("model.drop_path=0.0", "data.num_workers=0"),
    *("global_batch_size=24", f"schedule.cosine={STEPS} steps", "schedule.warmup=5 steps"),
    *("trainer.log_every=1 step", "trainer.save_every=6 steps", "trainer.eval_every=20 steps", "ema.half_life=5 steps"),
]
FSDP = ["engine=fsdp", "fsdp.unit_parameters=100000"]
ZERO = ["engine=zero", "zero.stage=2"]


def words(cluster: Cluster, digits: Path, tag: str, *others: str) -> list[str]:
    return [
        "--data_dir",
        str(digits / "shards"),
        "--tag",
        tag,
        f"output_dir={cluster.root / 'runs'}",
        *OPTIONS,
        *others,
    ]


def top1(run_dir: Path) -> float:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(row["top1"] for row in rows if row["kind"] == "val/ema")


@pytest.fixture(scope="session")
def alone(cluster, digits) -> Path:
    """A run of one process, without SLURM."""
    succeed(python("train.py", "--config", CONFIG, *words(cluster, digits, "alone", "engine=ddp")))
    return cluster.root / "runs/alone"


@pytest.mark.parametrize(
    ("tag", "options", "engine"),
    [
        ("fsdp-2", ["--nodes=2"], FSDP),
        ("fsdp-3", ["--nodes=3"], FSDP),
        ("zero-2", ["--nodes=2"], [*ZERO, "--engine-launcher", "deepspeed"]),
        ("zero-3", ["--nodes=3"], ZERO),
    ],
)
def test_nodes_together_train_as_one_process_does(cluster, digits, alone, tag, options, engine):
    job = cluster.submit(*options, "launch/train.sbatch", CONFIG, *words(cluster, digits, tag, *engine)).complete()
    found, wanted = losses(cluster.root / "runs" / tag), losses(alone)
    assert found.keys() == wanted.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-6)
    assert abs(top1(cluster.root / "runs" / tag) - top1(alone)) < 1
    assert re.search(r"finished: all [23] processes", job.log)


def test_evaluation_counts_as_one_process_does(cluster, digits, alone):
    asked = [str(alone), "--data_dir", str(digits / "shards"), "--batch-size", "7"]
    wanted = json.loads(succeed(python("evaluate.py", *asked)).stdout.splitlines()[-1])
    job = cluster.submit("--nodes=3", "launch/evaluate.sbatch", *asked).complete()
    found = json.loads(next(line for line in job.log.splitlines() if line.startswith("{")))
    assert wanted["num_samples"] == 360
    for share in ("loss", "ece"):
        assert found.pop(share) == pytest.approx(wanted.pop(share), rel=1e-6)
    assert found == wanted


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_array_of_sharding_survives_a_node(cluster, digits):
    """Four tasks on three nodes of which one dies: the bytes of one process."""
    out, options = cluster.root / "sharded", ["--shard-size", "200", "--short-side", "48"]
    succeed(python("-m", "data_prep.shard", digits / "raw", cluster.root / "sharded-alone", *options))
    array = ["--array=0-3", "--exclusive", "launch/shard.sbatch", digits / "raw", out, *options]
    number = cluster.submit(*array).number
    # The first shard is being written, or is: the tasks that run are at work.
    wait_for(lambda: list(out.rglob("*.tar*")), 60)
    struck = cluster.run("squeue", "-h", "-t", "running", "-w", "node2", "-o", "%i").split()
    assert len(struck) == 1
    cluster.call("kill", "node2")
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", number, check=False).strip(), 200)
    assert Job(cluster, struck[0]).show()["Restarts"] == "1"
    assert hashes(out) == hashes(cluster.root / "sharded-alone")


def test_options_of_a_gpu_cluster_and_a_device_for_each_process(cluster):
    """All options that such clusters ask for; each of two nodes with eight (false) GPUs."""
    (cluster.tree / "show_device.py").write_text(
        "import os, sys\n"
        "from gcvit.runtime.exit_status import write_report\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')\n"
        "sys.stdout.write('device ' + ' '.join(os.environ[n] for n in names) + '\\n')\n"
        "write_report(0, '')\n"
    )
    text = (ROOT / "launch/train.sbatch").read_text().replace("run_job train.py", "run_job show_device.py")
    (cluster.tree / "show_device.sbatch").write_text(text)
    options = ["--nodes=2", "--gpus-per-node=8", "--cpus-per-task=8", "--mem=0", "--exclusive", "--account=vision"]
    options += ["--qos=normal", "--partition=lab", "--time=1:00:00", "--comment=x", "--dependency=singleton"]
    job = cluster.submit(*options, "show_device.sbatch", "x.yaml", TASKS_PER_NODE="", OMP_NUM_THREADS="").complete()
    shown = sorted(line.split()[1:] for line in job.log.splitlines() if line.startswith("device "))
    all_of_node = ",".join(map(str, range(8)))
    assert shown == sorted([str(r), str(r % 8), "16", all_of_node, "1"] for r in range(16))


def test_deepspeeds_own_launcher_over_ssh(cluster, digits):
    """Outside of any job, with a hostfile of launch/hostfile.sh, over ssh between two hosts."""
    hostfile = cluster.root / "hostfile"
    hostfile.write_text(cluster.run("launch/hostfile.sh", "--slots", "1", "node1", "node2"))
    (cluster.tree / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    launcher = Path(cluster.python).with_name("deepspeed")
    command = [launcher, "--hostfile", hostfile, "--master_addr", "node1", "train.py", "--config", CONFIG]
    path = {"PATH": f"{launcher.parent}:/usr/sbin:/usr/bin:/bin", "PYTHONPATH": str(cluster.tree)}
    cluster.call("exec", "-n", "node1", *command, *words(cluster, digits, "ssh", *ZERO), timeout=200, **path)
    found = open_checkpoint(cluster.root / f"runs/ssh/checkpoints/step_{STEPS:08d}")
    assert found.info["world_size"] == 2
    assert read_tensors(found, "model")
