"""The Triton kernels against the reference in float64.

test_window_kernels.py runs this file in Triton's interpreter; without TRITON_INTERPRET=1 it runs on a GPU.
"""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcvit.model.attention import attend, attend_windows
from gcvit.model.kernels import window_attention as host
from gcvit.model.kernels.window_kernels import IS_INTERPRETED, find_run

DEVICE = "cpu" if IS_INTERPRETED.value else "cuda"

# Of the largest value. What half precision rounds, q, k, v and the weights, it rounds to 2^-9 or 2^-12.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PROGRAMS = ("FORWARD_PROGRAMS", "WHOLE_PROGRAMS", "PAIRS_PROGRAMS")


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """What no program writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random inputs of one call, none too small to be noticed."""

    def __init__(
        self,
        window: int,
        sides: tuple[int, int],
        *,
        shared: bool,
        dtype: torch.dtype = torch.float32,
        num_images: int = 2,
        num_heads: int = 1,
        head_dim: int = 16,
    ):
        self.window, self.num_heads, self.scale = window, num_heads, head_dim**-0.5
        generator = torch.Generator().manual_seed(window)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        dim = num_heads * head_dim
        self.parts = randn(num_images, *sides, (2 if shared else 3) * dim)
        self.queries = randn(num_images, window, window, dim) if shared else None
        self.table = randn((2 * window - 1) ** 2, num_heads).float()
        self.d_out = randn(num_images, *sides, dim)

    def run(self) -> list[Tensor]:
        """Output, and gradients of parts, table and queries, by the kernels."""
        inputs = [x.detach().requires_grad_() for x in self.inputs]
        settings_ = (self.window, self.num_heads, self.scale)
        out = host.window_attention(inputs[0], inputs[2] if len(inputs) > 2 else None, inputs[1], *settings_)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.d_out)]

    def run_reference(self) -> list[Tensor]:
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        settings_ = (self.window, self.num_heads, self.scale)
        out = attend_windows(inputs[0], inputs[2] if len(inputs) > 2 else None, inputs[1], *settings_, attend)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.d_out.double())]

    @property
    def inputs(self) -> list[Tensor]:
        return [self.parts, self.table] if self.queries is None else [self.parts, self.table, self.queries]

    def check(self) -> None:
        names = ("out", "d_parts", "d_table", "d_queries")
        dtypes = [self.d_out.dtype, *(x.dtype for x in self.inputs)]
        for name, dtype, ours, expected in zip(names, dtypes, self.run(), self.run_reference(), strict=False):
            assert ours.dtype == dtype, name
            assert ours.shape == expected.shape, name
            # A token alone in its window has exact zeros for gradients of what made its weight.
            error = (ours - expected).abs().max() / expected.abs().max().clamp(min=0.1)
            assert error < TOLERANCES[self.parts.dtype], f"{name}: {error:.1e}"


FP32, BF16, FP16 = TOLERANCES
LOCAL_AND_GLOBAL = pytest.mark.parametrize("shared", [False, True], ids=["local", "global"])


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize(
    ("window", "dtype", "head_dim"),
    [(7, FP32, 32), (7, BF16, 32), (7, FP16, 32), (12, FP32, 32), (14, BF16, 32), (16, BF16, 64)],
)
def test_the_published_windows(window: int, dtype: torch.dtype, head_dim: int, shared: bool) -> None:
    num_images = 2 if window == 7 else 1
    Case(window, (window, window), shared=shared, dtype=dtype, num_images=num_images, head_dim=head_dim).check()


# The interpreter takes minutes for each case of 1024 tokens: two of the four.
AT_LENGTH = [(w, dtype, shared) for w in (7, 12, 14, 16, 24) for dtype in (FP32, BF16) for shared in (False, True)]
AT_LENGTH += [(32, FP32, False), (32, BF16, True)]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "dtype", "shared"), AT_LENGTH)
def test_the_published_windows_at_length(window: int, dtype: torch.dtype, shared: bool) -> None:
    rows, number = (2, 2) if window < 24 else (1, 1)
    sizes = {"num_images": number, "num_heads": number, "head_dim": 32}
    Case(window, (rows * window, window), shared=shared, dtype=dtype, **sizes).check()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Of at most four windows an image, the last ones seldom whole; in fp32 from six on of several tiles."""
    window = draw(st.integers(1, 7))
    sides = st.integers(1, 2 * window)
    sizes = {"num_images": draw(st.integers(1, 3)), "num_heads": draw(st.integers(1, 2))}
    dtype = draw(st.sampled_from([FP32, BF16]))
    return Case(window, (draw(sides), draw(sides)), shared=draw(st.booleans()), dtype=dtype, **sizes)


@given(case=cases(), num_programs=st.integers(1, 24))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_map_window_and_number_of_programs(case: Case, num_programs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in PROGRAMS:
            patch.setattr(host, name, num_programs)
        case.check()


@LOCAL_AND_GLOBAL
@pytest.mark.parametrize("window", [3, 6], ids=["one tile", "several tiles"])
def test_images_do_not_hear_each_other(window: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = (window, window + 1)
    case = Case(window, sides, shared=shared)
    together = case.run()
    for name in PROGRAMS:
        monkeypatch.setattr(host, name, 1)  # one program serves all images, with one running sum
    for i, (ours, other) in enumerate(zip(together, case.run(), strict=True)):
        assert i == 2 or torch.equal(ours, other), i  # the table's gradient is summed in another order
    for image in range(2):
        alone = Case(window, sides, shared=shared, num_images=1)
        alone.parts, alone.table, alone.d_out = case.parts[[image]], case.table, case.d_out[[image]]
        alone.queries = None if case.queries is None else case.queries[[image]]
        for i, (ours, other) in enumerate(zip(together, alone.run(), strict=True)):
            assert i == 2 or torch.equal(ours[image], other[0]), i  # and is that of all images


@LOCAL_AND_GLOBAL
def test_maps_of_any_strides(shared: bool) -> None:
    case = Case(4, (4, 7), shared=shared)
    expected, parts = case.run(), case.parts
    num_channels = parts.shape[-1]
    wider = torch.full((2, 6, 9, num_channels + 5), torch.nan, device=DEVICE)
    wider[:, 1:5, 2:, 3 : 3 + num_channels] = parts
    layouts = {
        "part of a larger map": wider[:, 1:5, 2:, 3 : 3 + num_channels],
        "width before height": parts.transpose(1, 2).contiguous().transpose(1, 2),
        "images innermost": parts.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        "channels first": parts.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    }
    for name, layout in layouts.items():
        assert not layout.is_contiguous(), name
        assert torch.equal(layout, parts), name
        case.parts = layout
        for ours, other in zip(case.run(), expected, strict=True):
            assert torch.equal(ours, other), name
    case.parts = parts[:1].expand(2, -1, -1, -1)
    assert torch.equal(case.run()[0][0], expected[0][0])
    case.parts, case.d_out = parts, case.d_out[..., :1].expand_as(case.d_out)  # what a sum's gradient is
    case.check()


@LOCAL_AND_GLOBAL
def test_two_runs_give_the_same_bits(shared: bool) -> None:
    for window in (3, 6):  # one tile and several, in fp32
        case = Case(window, (window, window), shared=shared)
        assert all(torch.equal(*pair) for pair in zip(case.run(), case.run(), strict=True))


def test_a_table_in_half_precision_has_such_a_gradient() -> None:
    case = Case(4, (8, 8), shared=False, dtype=BF16)
    case.table = case.table.bfloat16()
    case.check()


def test_what_overflows_fp16_is_not_hidden() -> None:
    case = Case(4, (8, 8), shared=True, dtype=FP16)
    case.d_out.fill_(6e4)  # finite, as a loss scale too large leaves it; some sums of it are not
    assert not case.run()[1].isfinite().all()


def test_no_images_give_no_gradient() -> None:
    out, d_parts, d_table = Case(4, (8, 8), shared=False, num_images=0).run()
    assert out.shape == (0, 8, 8, 16)
    assert d_parts.shape == (0, 8, 8, 48)
    assert not d_table.any()


@triton.jit
def store_run(places, num_images, num_windows, images_per_run, runs_per_image):
    run = tl.program_id(0)
    first, last = find_run(run, num_images, num_windows, images_per_run, runs_per_image)
    tl.store(places + 2 * run, first)
    tl.store(places + 2 * run + 1, last)


@given(
    num_images=st.integers(1, 3000),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    max_programs=st.integers(1, 60),
    programs_per_run=st.integers(1, 50),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_runs_hold_every_window_once(
    num_images: int, rows: int, columns: int, max_programs: int, programs_per_run: int
) -> None:
    problem = host.Problem(torch.empty(num_images, rows, columns, 3, device="meta"), None, window=1, num_heads=1)
    images_per_run, runs_per_image, num_runs = problem.plan_runs(max_programs, programs_per_run)
    assert min(images_per_run, runs_per_image) == 1
    # Not more than twice as many programs as were asked for: images, or an image's parts, are not cut.
    assert num_runs <= 2 * max(1, max_programs // programs_per_run)
    places = torch.full((num_runs, 2), -1, dtype=torch.int32, device=DEVICE)
    store_run[(num_runs,)](places, num_images, rows * columns, images_per_run, runs_per_image)
    first, last = places.T
    assert (first < last).all()  # an empty run would leave its sums unwritten
    assert first[0] == 0
    assert torch.equal(first[1:], last[:-1])
    assert last[-1] == num_images * rows * columns
