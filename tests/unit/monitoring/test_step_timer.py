"""Who is the slowest, and what bounds it: by hand-made seconds, by a clock that is switched, by wrapped collectives."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gcvit.data.batch import Batch, Piece, empty_images
from gcvit.data.loader import _await_batch
from gcvit.monitoring import step_timer
from gcvit.monitoring.schema import STAGES
from gcvit.monitoring.step_timer import LOADING, Seconds, StepTimer, find_bottleneck, time_waits

TIMES = st.floats(0, 100)


def test_the_others_wait_for_the_slowest():
    slow = Seconds({"compute": 9.0, "waiting": 0.5})
    fast = Seconds({"compute": 1.0, "waiting": 8.5})
    bound = find_bottleneck([fast, slow, fast])
    assert (bound.slowest_rank, bound.bound_by) == (1, "compute")
    assert bound.bound_share == pytest.approx(9 / 9.5)


def test_a_network_that_all_wait_for_is_communication():
    bound = find_bottleneck([Seconds({"compute": 1.0, "waiting": waiting}) for waiting in (5.2, 5.0)])
    assert (bound.slowest_rank, bound.bound_by) == (1, "communication")


@pytest.mark.parametrize("stage", LOADING)
def test_waiting_for_data_is_what_the_loader_says(stage):
    loading = {**dict.fromkeys(LOADING, 1.0), stage: 5.0}
    slow, fast = Seconds({"data": 6.0, "compute": 2.0}, loading), Seconds({"compute": 2.0, "waiting": 6.0}, loading)
    bound = find_bottleneck([slow, fast])
    assert (bound.slowest_rank, bound.bound_by, bound.data_wait) == (0, stage, 0.75)
    assert bound.stages[stage] == pytest.approx(6 * 5 / 8)


def test_a_slow_loader_that_nobody_waits_for_bounds_nothing():
    bound = find_bottleneck([Seconds({"data": 0.1, "compute": 2.0}, {"storage": 100.0})])
    assert bound.bound_by == "compute"


@given(
    clock=st.dictionaries(
        st.sampled_from(["data", "waiting", "copy", "compute", "communication", "checkpoint"]), TIMES
    ),
    loading=st.dictionaries(st.sampled_from(LOADING), TIMES),
)
def test_no_second_is_lost(clock, loading):
    stages = Seconds(clock, loading).by_stage()
    assert tuple(stages) == STAGES
    assert sum(stages.values()) == pytest.approx(sum(clock.values()))


def test_a_clock_gives_each_moment_to_one_stage():
    timer = StepTimer(torch.device("cpu"))
    begin = time.perf_counter()
    timer.switch("compute")
    with timer.during("copy"):
        time.sleep(0.02)
    timer.switch(None)
    time.sleep(0.02)
    seconds = timer.snapshot().clock
    total = time.perf_counter() - begin
    assert seconds["copy"] >= 0.02
    assert sum(seconds.values()) <= total - 0.02
    assert set(timer.snapshot().clock) == {"waiting"}


def test_the_ranks_that_come_first_to_a_row_waited_for_the_last():
    timer = StepTimer(torch.device("cpu"))
    first = timer.snapshot(lambda: time.sleep(0.05))
    assert first.waiting >= 0.05
    assert find_bottleneck([first, Seconds({"compute": 0.05})]).slowest_rank == 1


def draw_piece(rows: list[int], **seconds: float) -> Piece:
    content = np.zeros(len(rows), np.int64), np.zeros((len(rows), 5), np.int64)
    return Piece(np.array(rows), empty_images(len(rows), 8), *content, (), np.array(rows), seconds)


def load(*pieces: tuple[float, Piece]) -> Batch:
    """A batch whose pieces come after so many seconds each."""

    def arrive():
        for seconds, piece in pieces:
            time.sleep(seconds)
            yield piece

    return _await_batch(torch.arange(4), arrive(), len(pieces))


def test_what_was_waited_for_is_blamed_and_not_what_took_long():
    """The first piece was decoded for 9 s, but in time; the second was late, by what it was read for most of all."""
    batch = load((0.0, draw_piece([0, 2], decoding=9.0)), (0.08, draw_piece([1, 3], storage=0.3, decoding=0.1)))
    timer = StepTimer(torch.device("cpu"))
    for _ in timer.batches(iter([(batch,)])):
        pass
    loading = timer.snapshot().loading
    assert loading["storage"] >= 0.06 > 0.03 > loading["decoding"] >= 0.02
    assert find_bottleneck([Seconds({"data": 1.0}, loading)]).bound_by == "storage"


def test_a_batch_that_is_ready_is_hardly_waited_for():
    batch = load((0.0, draw_piece([0, 1, 2, 3], storage=5.0, decoding=9.0)))
    assert sum(batch.waited.values()) < 1


class FakeGpu:
    """Passes events at the times of its stream, which the test moves on; `num_waits` counts who waited for it."""

    def __init__(self) -> None:
        self.now, self.num_waits = 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.time = gpu.now

            def query(self) -> bool:
                return True

            def elapsed_time(self, end: "Event") -> float:
                return 1000 * (end.time - self.time)

            def synchronize(self) -> None:
                gpu.num_waits += 1

        self.Event = Event

    def synchronize(self) -> None:
        self.num_waits += 1


@given(st.lists(st.tuples(st.sampled_from([None, "copy", "compute", "checkpoint"]), st.floats(0.001, 100))))
def test_on_a_gpu_stages_are_its_stream_s_and_only_a_row_waits_for_it(switches):
    with pytest.MonkeyPatch.context() as patch:
        fake, right = FakeGpu(), {}
        patch.setattr(torch.cuda, "Event", fake.Event)
        patch.setattr(torch.cuda, "current_stream", lambda: fake)
        patch.setattr(step_timer, "_MAX_MARKS", 6)  # some are added up on the way
        timer = StepTimer(torch.device("cuda"))
        for stage, seconds in switches:
            timer.switch(stage)
            fake.now += seconds
            if stage is not None:
                right[stage] = right.get(stage, 0.0) + seconds
        assert fake.num_waits == 0
        found = timer.snapshot().clock
        assert fake.num_waits == 2
    assert {stage: seconds for stage, seconds in found.items() if seconds} == pytest.approx(right)


def held_methods() -> dict[str, object]:
    """What PyTorch's classes hold: what `getattr` gives of a method would not be bound to its object any more."""
    return {**vars(dist.Work), **{f"group.{name}": method for name, method in vars(dist.ProcessGroup).items()}}


def talk(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Run a collective of each kind that a run has, through PyTorch's functions and methods."""
    tensor, box = torch.ones(3, device=device), ["word"]
    dist.broadcast(tensor, src=0, group=group)
    dist.all_reduce(tensor, group=group)
    dist.all_gather_into_tensor(torch.empty(3, device=device), tensor, group=group)
    dist.reduce_scatter_tensor(torch.empty(3, device=device), tensor, group=group)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    work.wait()
    dist.broadcast_object_list(box, src=0, group=group)
    boxes = [None]
    dist.all_gather_object(boxes, "word", group=group)
    dist.barrier(group=group)
    assert boxes == box
    assert tensor.tolist() == [1, 1, 1]


def issuing_stage(device: torch.device) -> str:
    """Name the stage of a collective's call: on a GPU it queues the work, and what takes time there is a wait."""
    return "waiting" if device.type == "cuda" else "communication"


@pytest.fixture(scope="module")
def engine(world):
    """As one of two ranks, of which this process is the only one: its collectives are real, and end at once."""
    stem = nn.Linear(2, 2).to(world.device)
    place = SimpleNamespace(size=2, device=world.device, new_group=world.new_host_group)
    return SimpleNamespace(world=place, module=SimpleNamespace(stem=stem))


@pytest.mark.gpu
def test_collectives_work_within_and_after_a_watch(engine, device):
    before, timer = held_methods(), StepTimer(device)
    with time_waits(timer, engine):
        assert held_methods() != before
        timer.switch("compute")
        talk(device)
        assert timer.stage == "compute"
        timer.switch(None)
    assert held_methods() == before
    assert {"waiting", issuing_stage(device)} <= set(timer.snapshot().clock)
    talk(device)


@pytest.mark.gpu
def test_an_error_gives_the_methods_back(engine, device):
    before, timer = held_methods(), StepTimer(device)

    def fail() -> None:
        with time_waits(timer, engine):
            timer.switch("compute")
            dist.group.WORLD.allreduce(["no tensor"])

    with pytest.raises(TypeError, match="incompatible"):
        fail()
    assert timer.stage == "compute"  # not the collective's
    assert held_methods() == before
    talk(device)


@pytest.mark.gpu
def test_watches_may_lie_within_each_other(engine, device):
    before, outer, inner = held_methods(), StepTimer(device), StepTimer(device)
    with time_waits(outer, engine):
        outer.switch("compute")
        with time_waits(inner, engine):
            inner.switch("compute")
            talk(device)
        talk(device)
    assert held_methods() == before
    assert min(timer.snapshot().clock[issuing_stage(device)] for timer in (outer, inner)) > 0
    talk(device)


@pytest.mark.gpu
def test_another_thread_talks_untimed_while_watches_come_and_go(engine, device):
    """As the one that writes checkpoints does, on a group of its own."""
    group, is_over, failures, num_talks = engine.world.new_group(), threading.Event(), [], 0

    def write() -> None:
        nonlocal num_talks
        try:
            while not is_over.is_set() or num_talks < 20:
                talk(torch.device("cpu"), group)
                num_talks += 1
        except BaseException as error:
            failures.append(error)

    writer, timer = threading.Thread(target=write), StepTimer(device)
    writer.start()
    try:
        for _ in range(50):
            with time_waits(timer, engine):
                timer.switch("compute")
                time.sleep(0.002)
                timer.switch(None)
    finally:
        is_over.set()
        writer.join()
    assert not failures
    assert set(timer.snapshot().clock) == {"compute", "waiting"}  # the latter of `snapshot`
    talk(device)


@pytest.mark.gpu
def test_the_rest_of_a_backward_after_the_first_layer_s_gradient_is_waiting(engine, device):
    timer = StepTimer(device)
    stem = engine.module.stem
    with time_waits(timer, engine):
        timer.switch("compute")
        stem(torch.ones(1, 2, device=device)).sum().backward()
        assert timer.stage == "waiting"
    timer.switch("compute")
    stem(torch.ones(1, 2, device=device)).sum().backward()
    assert timer.stage == "compute"
