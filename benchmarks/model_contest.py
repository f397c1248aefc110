"""Measure models that take turns on one device: speed, memory, number of kernels. Used by `benchmarks.model`."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model_check import describe
from gcvit.model import create_model
from gcvit.model.variants import VARIANTS
from gcvit.parallel.compile import compile_parts

OURS = ("reference", "sdpa", "triton")
SKIPPING = "skipping"  # attention=auto, and drop path that does not compute what it drops
MODES = ("forward", "training")
NUM_WARM_UPS = 3
IMG_SIZE = 224


class Entry(NamedTuple):
    """Name a contender: "timm", one of our attention paths or "skipping"; compiled or not; captured in CUDA graphs."""

    kind: str
    is_compiled: bool = False
    is_captured: bool = False

    @property
    def name(self) -> str:
        return self.kind + " compiled" * self.is_compiled + " captured" * self.is_captured


class Contender:
    """Run a model of a variant as its entry says.

    A training step is forward, cross-entropy, backward and AdamW; forward is evaluation without gradients. The
    precision is fp32 on a CPU and bf16 autocast on a GPU. Our model is compiled in parts, as by the trainer, and timm's
    whole. A captured contender runs as one CUDA graph.
    """

    def __init__(self, variant: str, entry: Entry, device: torch.device):
        self.name, self.device, self.bytes_before = entry.name, device, used_bytes(device)
        self.model = build_model(variant, entry.kind).to(device)
        if entry.is_compiled and entry.kind == "timm":
            self.model.compile(dynamic=False)
        elif entry.is_compiled:
            compile_parts(self.model)
        self.is_captured = entry.is_captured
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True, capturable=self.is_captured)

    def run(self, mode: str, images: Tensor, labels: Tensor) -> None:
        if mode in self.graphs:
            self.graphs[mode].replay()
        else:
            self.compute(mode, images, labels)

    def compute(self, mode: str, images: Tensor, labels: Tensor) -> None:
        self.model.train(mode == "training")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if mode == "forward":
                with torch.no_grad():
                    self.model(images)
                return
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self, mode: str, images: Tensor, labels: Tensor) -> None:
        if not self.is_captured:
            for _ in range(NUM_WARM_UPS):
                self.compute(mode, images, labels)
            return
        # A graph is recorded on a stream that is not the default one, and what it will replay has to be warm there.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                self.compute(mode, images, labels)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute(mode, images, labels)
        self.graphs[mode] = graph
        self.run(mode, images, labels)

    def measure_peak(self, mode: str, images: Tensor, labels: Tensor) -> int | None:
        """Measure the peak bytes of a run: weights, moments and activations of this contender alone; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.run(mode, images, labels)
        return torch.cuda.max_memory_allocated() - self.bytes_before


def used_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def build_model(variant: str, kind: str) -> nn.Module:
    if kind == "timm":
        return build_timm(variant)
    is_skipping = kind == SKIPPING
    return create_model(variant, attention="auto" if is_skipping else kind, drop_path_skips=is_skipping)


def build_timm(variant: str) -> nn.Module:
    """Build timm's model of our variant, for which timm may have no name."""
    row = VARIANTS[variant]
    model = GlobalContextVit(
        embed_dim=row.width,
        depths=row.depths,
        num_heads=row.num_heads,
        window_ratio=tuple(IMG_SIZE // window for window in row.windows),
        mlp_ratio=row.mlp_ratio,
        layer_scale=row.layer_scale,
        drop_path_rate=row.drop_path_rate,
    )
    num_params = sum(p.numel() for p in model.parameters())
    assert num_params == row.num_params, f"timm's {variant} has {num_params} parameters, not {row.num_params}"
    return model


def count_flops(variant: str) -> int:
    """Count the FLOPs of an image's forward pass, of matrix products and convolutions: twice the multiply-adds."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(variant, attention="reference").eval()(torch.empty(1, 3, IMG_SIZE, IMG_SIZE))
    return counter.get_total_flops()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_calls(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Measure the seconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def measure_product_rate(device: torch.device, num_calls: int) -> float:
    """Measure the FLOP/s of a large square matrix product, in the contest's precision: bf16 on a GPU, fp32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind(0)
    return 2 * side**3 / time_calls(lambda: a @ b, num_calls, device)


def count_kernels(profile: Any) -> int:
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def profile_run(contender: Contender, mode: str, images: Tensor, labels: Tensor) -> Any:
    with torch.profiler.profile() as profile:
        contender.run(mode, images, labels)
        synchronize(contender.device)
    return profile


def prepare(
    variant: str, entry: Entry, device: torch.device, images: Tensor, labels: Tensor
) -> tuple[Contender, dict[str, dict[str, Any]]]:
    """Build and warm up a contender, and measure its peak memory and number of kernels per mode."""
    contender, rows = Contender(variant, entry, device), {}
    for mode in reversed(MODES):  # training first, so that both find the moments there
        contender.warm_up(mode, images, labels)
        peak, num_kernels = contender.measure_peak(mode, images, labels), None
        if device.type == "cuda":
            num_kernels = count_kernels(profile_run(contender, mode, images, labels))
        rows[mode] = {"peak_bytes": peak, "num_kernels": num_kernels}
    return contender, rows


def hold_contest(
    variant: str,
    entries: list[Entry],
    device: torch.device,
    *,
    batch_size: int,
    num_rounds: int,
    runs_per_turn: int,
    trace: str | None = None,
) -> dict[str, Any]:
    """Measure the contenders in rounds in which they take turns.

    A contender that fails leaves the rounds, with its error in the result. With `trace` the first is profiled into that
    file.

    Returns:
        The medians per mode and name; the ratios to timm's are medians of the rounds' ratios.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # graphs of an earlier contest count against the compiler's limits
    images = torch.randn(batch_size, 3, IMG_SIZE, IMG_SIZE, device=device)
    labels = torch.randint(1000, (batch_size,), device=device)
    found: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in MODES}
    result: dict[str, Any] = {"variant": variant, "batch_size": batch_size, "modes": found, "failed": {}}
    contenders: list[Contender] = []
    for entry in entries:
        try:
            contender, rows = prepare(variant, entry, device, images, labels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # one that does not run here must not cost the others their figures
            result["failed"][entry.name] = describe(error)
        else:
            contenders.append(contender)
            for mode in MODES:
                found[mode][contender.name] = rows[mode]
        gc.collect()  # what a failed one leaves would count as the next one's
    if trace:
        profile = profile_run(contenders[0], "training", images, labels)
        profile.export_chrome_trace(trace)
        result["most expensive"] = find_most_expensive(profile, device)

    seconds: dict[str, dict[str, list[float]]] = {mode: {c.name: [] for c in contenders} for mode in MODES}
    rates: list[float] = []
    for turn in range(num_rounds):
        rates.append(measure_product_rate(device, num_calls=4 * runs_per_turn))
        for mode in MODES:
            for i in range(len(contenders)):
                one = contenders[(turn + i) % len(contenders)]
                # Called at once, so that the closure's variables are still those of this turn.
                took = time_calls(lambda: one.run(mode, images, labels), runs_per_turn, device)  # noqa: B023
                seconds[mode][one.name].append(took)

    result["product_rate"] = statistics.median(rates)
    flops = count_flops(variant)
    for mode in MODES:
        flops_per_image = flops * (3 if mode == "training" else 1)
        for name, own in seconds[mode].items():
            row = found[mode][name]
            row["images_per_s"] = batch_size / statistics.median(own)
            row["mfu"] = flops_per_image * row["images_per_s"] / result["product_rate"]
            row["ratios"] = {
                other: statistics.median(t / o for t, o in zip(seconds[mode][other], own, strict=True))
                for other in ("timm", "timm compiled")
                if other in seconds[mode]
            }
            row["seconds"] = own
    return result


def find_most_expensive(profile: Any, device: torch.device) -> list[tuple[str, float, int]]:
    """Find the ten operations with the longest own time: name, milliseconds, calls."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    ops = sorted(profile.key_averages(), key=lambda op: getattr(op, attribute), reverse=True)
    return [(op.key, getattr(op, attribute) / 1000, op.count) for op in ops[:10]]
