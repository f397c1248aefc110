"""One cluster for all tests in this folder, with the demo's digits."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launching import python, succeed
from tests.integration.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(
        tmp_path_factory.mktemp("slurm"), sys.executable, SLAB_NODES="3", SLAB_GPUS="8", SLAB_CPUS="8", SLAB_GRACE="12"
    )
    try:
        cluster.call("up", timeout=90)
        yield cluster
    finally:
        cluster.call("down")


@pytest.fixture(autouse=True)
def quiet_nodes(request, cluster) -> Iterator[None]:
    """Each test begins with three live, idle nodes, and leaves no job."""
    for node in ("node1", "node2", "node3"):
        cluster.call("boot", node, timeout=90)
    cluster.wait_until_idle()
    yield
    cluster.run("scancel", "--user=root", check=False)


@pytest.fixture(scope="session")
def digits(cluster) -> Path:
    """raw/ (class folders) and shards/ of the demo."""
    root = cluster.root / "digits"
    succeed(python("-m", "data_prep.digits", root / "raw"))
    succeed(python("-m", "data_prep.shard", root / "raw", root / "shards", "--shard-size", 200))
    return root
