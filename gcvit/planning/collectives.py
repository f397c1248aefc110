"""The time of a collective on given links, by the model that NCCL itself uses to select its rings, trees and protocols.

All times are seconds, all sizes bytes. `docs/scaling.md` has the sources of the links' bandwidths.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes per second of one GPU, in one direction, as collectives reach them."""

    nvlink: float
    network: float  # a GPU's share of the network of its node
    post: float  # seconds that a host needs to post a message to the network
    memory: float  # bandwidth of the GPU's own memory
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Group:
    """The GPUs that take part in a collective, equally many in each node."""

    num_nodes: int
    per_node: int

    @property
    def size(self) -> int:
        return self.num_nodes * self.per_node


@dataclass(frozen=True)
class Message:
    """A collective over a group. `num_bytes` is the size of the whole tensor, which all-gather leaves on each rank."""

    kind: str  # all_gather, reduce_scatter, all_reduce
    num_bytes: float
    group: Group

    @property
    def sent(self) -> float:
        """Count the bytes that a rank sends if the collective uses a ring."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * self.num_bytes * (self.group.size - 1) / self.group.size


@dataclass(frozen=True)
class Protocol:
    """A protocol of NCCL: the share of the bandwidth that it reaches, and the seconds of a call and of each hop."""

    share: float
    call: float
    node_hop: float
    network_hop: float
    limit: float = math.inf  # bytes per second


# NCCL's own constants, from which it selects a protocol: src/graph/tuning.cc at b6475625 of https://github.com/NVIDIA/nccl,
# baseLat, hwLat (NVLink, network) and the factors below "Various model refinements". Its corrections for trees of
# medium size are left out, as is NVLink SHARP.
RINGS = (
    Protocol(1 / 4, 6.6e-6, 0.6e-6, 2.7e-6, limit=20e9),  # LL
    Protocol(0.92, 14.0e-6, 1.9e-6, 4.0e-6),  # LL128
    Protocol(1.0, 8.4e-6, 3.4e-6, 14.0e-6),  # Simple
)
TREES = (
    Protocol(0.92 / 3.8, 6.8e-6, 0.6e-6, 5.0e-6, limit=20e9),
    Protocol(0.92 * 120 / 128, 14.0e-6, 1.25e-6, 8.5e-6),
    Protocol(0.92, 0.0, 28.0e-6, 28.0e-6),
)


def collective_seconds(message: Message, links: Links) -> float:
    """Predict the seconds of a collective: the fastest of NCCL's rings and, for an all-reduce, of its trees."""
    group = message.group
    if group.size == 1:
        return 0.0
    bandwidth = math.inf if group.per_node == 1 else links.nvlink
    if group.num_nodes > 1:
        # NCCL runs one ring for each GPU of a node, each over one GPU's share of the network.
        bandwidth = min(bandwidth, group.per_node * links.network)
    reduces = message.kind == "all_reduce"
    num_hops = (2 if reduces else 1) * (group.size - 1)
    network_hops = 0 if group.num_nodes == 1 else 2 * group.num_nodes if reduces else group.num_nodes - 1
    times = []
    for protocol in RINGS:
        node_hop = protocol.node_hop if group.num_nodes == 1 else max(protocol.node_hop, links.post)
        latency = protocol.call + (num_hops - network_hops) * node_hop + network_hops * protocol.network_hop
        times.append(latency + message.sent / min(protocol.share * bandwidth, protocol.limit))
    if group.num_nodes == 2:
        # A tree over two nodes sends the tensor across once in each direction, a ring almost twice.
        bandwidth = min(links.nvlink if group.per_node > 1 else math.inf, 2 * group.per_node * links.network)
    for protocol in TREES if reduces else ():
        hops = (group.per_node - 1) * protocol.node_hop + math.log2(group.num_nodes) * protocol.network_hop
        rate = min(protocol.share * bandwidth, protocol.limit)
        times.append(protocol.call + 2 * hops + 2 * message.num_bytes / rate)
    return min(times)


H100_LINKS = Links(nvlink=370e9, network=47e9, post=1e-6, memory=3.35e12)  # 8 x 400 Gb/s a node
A100_LINKS = Links(nvlink=235e9, network=24e9, post=2e-6, memory=2.039e12)  # 8 x 200 Gb/s
GPU_LINKS = {
    "h100-80": H100_LINKS,
    "h200": replace(H100_LINKS, memory=4.8e12),  # H200 data sheet (NVIDIA, 2024); NVLink as the H100's
    "a100-80": A100_LINKS,
    "a100-40": replace(A100_LINKS, memory=1.555e12),  # A100 data sheet (NVIDIA 1758950, June 2021)
}
"""The links of a cluster of such GPUs, by the names of `gcvit.runtime.gpu_specs`; other GPUs have no prediction."""
