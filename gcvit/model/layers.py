"""Define the parts of GC ViT, stem, downsampler, global query generator and block, and their initial values.

All maps are (B, H, W, C), contiguous, as attention and LayerNorm need them. Convolutions call this layout
channels_last, so that the permutations around them are views.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from gcvit.model.attention import WindowAttention

INIT_STD = 0.02


class Conv2d(nn.Conv2d):
    """Convolve (B, H, W, C) maps with PyTorch's convolution."""

    def forward(self, x_bhwc: Tensor) -> Tensor:
        return super().forward(x_bhwc.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SqueezeExcite(nn.Module):
    """Compute a gate for each channel, (B, 1, 1, C), from the map's mean; the hidden width is a quarter of C."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4, bias=False)
        self.fc2 = nn.Linear(dim // 4, dim, bias=False)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        # Not `mean`, whose gradient is a whole map; a sum's is a view. Like `mean`, it adds in fp32 or above.
        total = x_bhwc.sum(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x_bhwc.dtype, torch.float32))
        mean = (total / (x_bhwc.shape[1] * x_bhwc.shape[2])).to(x_bhwc.dtype)
        return self.fc2(F.gelu(self.fc1(mean))).sigmoid()


class GatedPointwise(nn.Conv2d):
    """Apply a 1x1 convolution to a map (B, H, W, C) whose channels are scaled by a gate (B, 1, 1, C)."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=1, bias=False)

    def forward(self, x_bhwc: Tensor, gate_b11c: Tensor) -> Tensor:  # type: ignore[override]
        height, width, dim = x_bhwc.shape[1:]
        # Weights of its own for each image, where they are smaller than the map: a scaled map costs a pass over memory
        # in forward, more in backward, and must be kept for it.
        if height * width > dim:
            weights_boi = self.weight.flatten(1) * gate_b11c.flatten(1, 2)
            return (x_bhwc.flatten(1, 2) @ weights_boi.transpose(1, 2)).unflatten(1, (height, width))
        return (x_bhwc * gate_b11c) @ self.weight.flatten(1).t()


class FusedBlock(nn.Module):
    """Add depthwise convolution, GELU, squeeze-excitation and pointwise convolution to the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.squeeze_excite = SqueezeExcite(dim)
        self.pointwise = GatedPointwise(dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        inner = F.gelu(self.depthwise(x_bhwc))
        return x_bhwc + self.pointwise(inner, self.squeeze_excite(inner))


class Downsample(nn.Module):
    """Halve a map's sides: (B, H, W, dim) to (B, H/2, W/2, dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.fused = FusedBlock(dim)
        self.reduction = Conv2d(dim, dim_out, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(dim_out)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.fused(self.norm1(x_bhwc))))


class Stem(nn.Module):
    """Compute the first map (B, H/4, W/4, width) of images (B, in_chans, H, W)."""

    def __init__(self, in_chans: int, width: int):
        super().__init__()
        self.conv = Conv2d(in_chans, width, kernel_size=3, stride=2, padding=1)
        self.downsample = Downsample(width, width)

    def forward(self, images_bchw: Tensor) -> Tensor:
        # The one copy into channels-last is made where it is cheapest: three channels.
        return self.downsample(self.conv(images_bchw.permute(0, 2, 3, 1).contiguous()))


class QueryGenerator(nn.Module):
    """Compute a stage's global queries: its map (B, H, W, C), pooled to the size of a window (B, w, w, C).

    Each pooling has one fused block; if `num_poolings` is 0, one block remains, without pooling. The published maps
    have sides of w * 2**num_poolings, which become exactly w. A map of another shape is pooled as long as a window
    still fits into it. A side that is then longer than w is averaged down, so that each query covers an equal share of
    the map. A side is shorter only if the map's own side is. Then one window covers it and ends beyond the map: its
    positions have their queries, and zeros stand for the positions that do not exist.
    """

    def __init__(self, dim: int, num_poolings: int, window: int):
        super().__init__()
        self.num_poolings, self.window = num_poolings, window
        self.fused = nn.ModuleList(FusedBlock(dim) for _ in range(max(1, num_poolings)))

    def forward(self, x_bhwc: Tensor) -> Tensor:
        for fused in self.fused:
            x_bhwc = fused(x_bhwc)
            height, width = x_bhwc.shape[1:3]
            if self.num_poolings and is_poolable(height, width, self.window):
                x_bchw = F.max_pool2d(x_bhwc.permute(0, 3, 1, 2), kernel_size=3, stride=2, padding=1)
                x_bhwc = x_bchw.permute(0, 2, 3, 1)
        fitted = average_sides(x_bhwc, self.window)
        height, width = fitted.shape[1:3]
        if min(height, width) < self.window:
            return F.pad(fitted, (0, 0, 0, self.window - width, 0, self.window - height))
        # FSDP hangs its backward hook on the output and warns of views: pooled maps are small enough to copy.
        return x_bhwc if fitted is x_bhwc and not self.num_poolings else fitted.clone()


def is_poolable(height: int, width: int, window: int) -> bool:
    """Return whether a map that is halved, with odd sides rounded up, is still as large as a window."""
    side = min(height, width)
    return side > window and (side + 1) // 2 >= window


def average_sides(x_bhwc: Tensor, size: int) -> Tensor:
    """Shorten the sides of a map that exceed `size` to `size`, by means over equal shares; leave the other sides.

    A position on the border of two shares counts for each by its part. The means are products with small matrices,
    since PyTorch's adaptive pooling rounds the shares and adds its gradients in any order.
    """
    height, width = x_bhwc.shape[1:3]
    if height > size:
        x_bhwc = torch.einsum("yh,bhwc->bywc", _shares(height, size, x_bhwc), x_bhwc)
    if width > size:
        x_bhwc = torch.einsum("xw,bhwc->bhxc", _shares(width, size, x_bhwc), x_bhwc)
    return x_bhwc


def _shares(length: int, size: int, like: Tensor) -> Tensor:
    """Compute weights (size, length): each row is a mean over one of `size` equal intervals of `length` positions."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    ends = torch.arange(size + 1, dtype=dtype, device=like.device)[:, None] * (length / size)
    starts = torch.arange(length, dtype=dtype, device=like.device)
    overlaps = torch.minimum(ends[1:], starts + 1) - torch.maximum(ends[:-1], starts)
    return (overlaps.clamp(min=0) * (size / length)).to(like.dtype)


class DropPath(nn.Module):
    """Zero each image's map with probability `drop_prob` in training, and divide the others by 1 - drop_prob."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        self.drops = drop_prob > 0
        # `forward` reads this tensor and not `drop_prob`, so that blocks of different rates share compiled code. It is
        # no buffer: it stays on the CPU and is passed to kernels as a number.
        self.share_kept = torch.tensor(1 - drop_prob, dtype=torch.float32, device="cpu")

    def forward(self, x_bhwc: Tensor) -> Tensor:
        if not (self.training and self.drops):
            return x_bhwc
        is_kept = torch.rand(len(x_bhwc), 1, 1, 1, device=x_bhwc.device) < self.share_kept
        return x_bhwc * (is_kept / self.share_kept).to(x_bhwc.dtype)


class Block(nn.Module):
    """Apply pre-norm attention and MLP with residuals, layer scale and drop path to a map (B, H, W, C).

    With `drop_path_skips`, the images that drop path drops in training are not computed, see `add_to_some`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        uses_global_queries: bool,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path_rate: float,
        drop_path_skips: bool = False,
        attention: str = "auto",
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads, window, uses_global_queries, attention)
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path_rate)
        self.drop_path_skips = drop_path_skips

    def forward(self, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
        x = self._add(self._attend, x_bhwc, queries_bwwc)
        return self._add(self._transform, x)

    def _attend(self, x_bhwc: Tensor, queries_bwwc: Tensor) -> Tensor:
        return self.scale1(self.attention(self.norm1(x_bhwc), queries_bwwc))

    def _transform(self, x_bhwc: Tensor) -> Tensor:
        return self.scale2(self.mlp(self.norm2(x_bhwc)))

    def _add(self, branch: Callable[..., Tensor], x_bhwc: Tensor, *queries_bwwc: Tensor) -> Tensor:
        if self.drop_path_skips and self.training:
            return add_to_some(branch, self.drop_path.drop_prob, x_bhwc, *queries_bwwc)
        return x_bhwc + self.drop_path(branch(x_bhwc, *queries_bwwc))


def add_to_some(branch: Callable[..., Tensor], drop_rate: float, x: Tensor, *others: Tensor) -> Tensor:
    """Compute x + branch(x, *others) for images that drop path keeps, and return x for the others, at no cost.

    The number of kept images is fixed, so that shapes never change: it is nearest to their share of the batch, and at
    least one. The branch is scaled by the inverse of the kept fraction, so the mean over many draws is exactly
    x + branch(x, *others). In a batch too small for the rate to drop one image, none is dropped. After DINOv2.
    """
    num_images = len(x)
    num_kept = max(1, round(num_images * (1 - drop_rate)))
    if num_kept == num_images:
        return x + branch(x, *others)
    kept = torch.randperm(num_images, device=x.device)[:num_kept]
    added = branch(*(tensor.index_select(0, kept) for tensor in (x, *others)))
    return x.index_add(0, kept, added.to(x.dtype), alpha=num_images / num_kept)


class InitialLaw(NamedTuple):
    """Describe an initial value: the whole shape, and "normal" (std), "uniform" (bound) or "constant"."""

    shape: torch.Size
    kind: str
    value: float


def find_initial_laws(model: nn.Module) -> dict[str, InitialLaw]:
    """Return the published initialization of every parameter, by the module that holds it."""
    laws = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            laws[name] = InitialLaw(parameter.shape, *_initial_law(module, leaf))
    return laws


def _initial_law(module: nn.Module, leaf: str) -> tuple[str, float]:
    match module:
        case nn.Conv2d():  # the framework's default, kaiming_uniform(a=sqrt(5)); its bias has the same bound
            return "uniform", module.weight[0].numel() ** -0.5
        case nn.Linear():
            return ("normal", INIT_STD) if leaf == "weight" else ("constant", 0.0)
        case nn.LayerNorm():
            return "constant", 1.0 if leaf == "weight" else 0.0
        case WindowAttention():
            return "normal", INIT_STD
        case LayerScale():
            return "constant", module.init_values
    raise AssertionError(f"no initial law for {leaf} of {type(module).__name__}")


def draw_initial(law: InitialLaw, name: str, seed: int) -> Tensor:
    """Draw the initial value of the whole parameter `name`, fp32 on the CPU, from the arguments alone."""
    with torch.device("cpu"):
        if law.kind == "constant":
            return torch.full(law.shape, law.value, dtype=torch.float32)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        tensor = torch.empty(law.shape, dtype=torch.float32)
        if law.kind == "uniform":
            return tensor.uniform_(-law.value, law.value, generator=generator)
        return nn.init.trunc_normal_(tensor, std=law.value, generator=generator)
