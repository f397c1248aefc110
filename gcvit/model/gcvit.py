"""Define GC ViT (Hatamizadeh et al., ICML 2023): the image classifier, its cut points and its initial weights.

    images (B, 3, H, W) -> stem -> H/4 x W/4 map -> four stages -> norm -> average pool -> linear head -> logits

A stage halves the map and doubles its width (the first does neither), derives global queries from it once per
image, and runs its blocks: even ones attend within local windows, odd ones with the global queries. Maps are
(B, H, W, C); where a side is odd, half of it is rounded up. The model holds no buffers and knows nothing of
parallelism: `cut_points` says where it may be cut.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models._features import feature_take_indices
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcvit.errors import UserError
from gcvit.model.layers import (
    Block,
    Downsample,
    QueryGenerator,
    Stem,
    draw_initial,
    find_initial_laws,
    is_poolable,
)

NUM_STAGES = 4
MIN_SIDE = 32
"""In pixels. With a smaller side the last map, 1/32 of the image, would have less than a position."""


class Stage(nn.Module):
    """Downsample the map (not in the first stage), generate the global queries, and run the blocks."""

    def __init__(self, downsample: Downsample | None, query_generator: QueryGenerator, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.query_generator = query_generator
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x_bhwc: Tensor) -> Tensor:
        recompute = self.grad_checkpointing and self.training
        x = x_bhwc if self.downsample is None else run(self.downsample, x_bhwc, recompute=recompute)
        queries = run(self.query_generator, x, recompute=recompute)
        for block in self.blocks:
            x = run(block, x, queries, recompute=recompute)
        return x


def run(module: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """Call a module; with `recompute`, drop its activations and compute them again in the backward pass."""
    return checkpoint(module, *inputs, use_reentrant=False) if recompute else module(*inputs)


class GCViT(nn.Module):
    """Classify images (B, in_chans, height, width) of `img_size`, in pixels, into logits (B, num_classes).

    Weights are set by `init_weights(seed=0)`, except on the meta device.

    Args:
        width: Channels of the first stage; stage i has `width * 2**i`.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        windows: Side of each stage's windows, in positions of its map. The map has 1 / (4 * 2**i) of the image's on
            each side, rounded up. Where windows do not divide a map, the last ones end beyond it.
        img_size: One number, or (height, width), of 32 or more.
        drop_path_rate: The last block's, rising linearly from 0 over all blocks.
        drop_path_skips: Do not compute the images that drop path drops in training, a fixed share of each batch.
        dynamic_img_size: Accept images of any size. Then `img_size` only determines the number of poolings, which
            belongs to the weights as the windows do.
        attention: A path of `WindowAttention`.

    Raises:
        UserError: The sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        width: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        windows: Sequence[int],
        img_size: int | Sequence[int],
        mlp_ratio: float,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        drop_path_skips: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        dynamic_img_size: bool = False,
        attention: str = "auto",
    ):
        super().__init__()
        check_stages(windows, width, depths, num_heads)
        self.img_size, self.dynamic_img_size = img_size, dynamic_img_size
        sides = read_sides(img_size)
        self.input_size = (in_chans, *sides)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.grad_checkpointing = False
        self.output_fmt = "NHWC"  # of forward_features, in timm's word
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)

        self.stem = Stem(in_chans, width)
        stages: list[Stage] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, (depth, heads, window) in enumerate(zip(depths, num_heads, windows, strict=True)):
            dim, reduction = width * 2**i, 4 * 2**i
            num_poolings = count_poolings(math.ceil(sides[0] / reduction), math.ceil(sides[1] / reduction), window)
            blocks = [
                Block(
                    dim,
                    heads,
                    window,
                    uses_global_queries=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path_rate=rates[sum(depths[:i]) + j],
                    drop_path_skips=drop_path_skips,
                    attention=attention,
                )
                for j in range(depth)
            ]
            downsample = Downsample(dim // 2, dim) if i else None
            stages.append(Stage(downsample, QueryGenerator(dim, num_poolings, window), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = nn.LayerNorm(dim)
        self.num_features = self.head_hidden_size = dim
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC")

        # Recorded now, since an engine that shards replaces the parameters by its own pieces.
        self.initial_laws = find_initial_laws(self)
        if not next(self.parameters()).is_meta:
            self.init_weights()

    # Forward.

    def forward(self, images_bchw: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_bchw))

    def forward_features(self, images_bchw: Tensor) -> Tensor:
        """Compute the last, normalised map (B, H/32, W/32, num_features), sides rounded up."""
        return self.norm(self.stages(self._run_stem(images_bchw)))

    def forward_head(self, x_bhwc: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the last map; with `pre_logits` only pool."""
        return self.head(x_bhwc, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the stages' maps as (B, C, H, W), in timm's convention; `norm` normalises the last one."""
        assert output_fmt == "NCHW", "timm's feature extraction asks for NCHW"
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last_taken + 1] if stop_early or intermediates_only else self.stages
        x = self._run_stem(x)
        maps_bchw = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in taken:
                is_final = i == len(self.stages) - 1
                maps_bchw.append((self.norm(x) if norm and is_final else x).permute(0, 3, 1, 2))
        if intermediates_only:
            return maps_bchw
        return (self.norm(x) if len(stages) == len(self.stages) else x), maps_bchw

    def _run_stem(self, images_bchw: Tensor) -> Tensor:
        _, channels, height, width = images_bchw.shape
        expected = self.input_size
        if self.dynamic_img_size and min(height, width) >= MIN_SIDE:
            expected = (self.in_chans, height, width)
        if (channels, height, width) != expected:
            raise UserError(
                "images of the wrong size for this model",
                got=tuple(images_bchw.shape),
                expected=f"(batch, {', '.join(map(str, expected))})",
                hint=f"resize the images, or build the model with their img_size, or for any of {MIN_SIDE} or more "
                "(dynamic_img_size)",
            )
        return run(self.stem, images_bchw, recompute=self.grad_checkpointing and self.training)

    # For engines: cut points and initial values.

    def cut_points(self) -> list[str]:
        """Return the names of the modules, in forward order, that may be sharded or recomputed.

        Each takes tensors by position and returns one tensor. What remains (norm, head) belongs to the root.
        """
        cuttable = (Stem, Downsample, QueryGenerator, Block)
        names = [name for name, module in self.named_modules() if isinstance(module, cuttable)]
        return [name for name in names if name != "stem.downsample"]  # one cut is enough for the stem

    def init_buffers(self) -> None:
        """Fill the buffers after `to_empty`. There are none: see `attention.expand_bias_table`."""
        assert not list(self.buffers()), "a buffer was added: fill it here"

    def initial_value(self, name: str, seed: int) -> Tensor:
        """Return the initial value of the whole parameter `name`, fp32 on the CPU, drawn from a generator of its own.

        This works for parameters on meta, sharded or partitioned.
        """
        return draw_initial(self.initial_laws[name], name, seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter, in place, to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_value(name, seed))

    # timm's conventions.

    def no_weight_decay(self) -> set[str]:
        """Return the names of the bias tables, as timm does.

        The published run decays them: `optim.decay_bias_tables` chooses.
        """
        return {name for name, _ in self.named_parameters() if name.endswith("bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers in forward order for timm's layer decay: stages if `coarse`, else blocks."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        # A stage's downsampler and query generator go with its first block, the norm with the last one.
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|query_generator)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),  # timm's mark for "with the previous group"
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def find_layers(self) -> dict[str, int]:
        """Return the layer of each parameter, by `group_matcher`: the stem is 0, the head comes last.

        This works for parameters on meta, sharded or partitioned.
        """
        shapes = [(name, law.shape) for name, law in self.initial_laws.items()]
        layers = group_with_matcher(shapes, self.group_matcher(), reverse=True)
        return {name: int(layer) for name, layer in layers.items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every cut point during training."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; with 0 classes the model returns pooled features."""
        weight = next(self.parameters())
        self.head.reset(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.initial_laws = find_initial_laws(self)
        if num_classes and not weight.is_meta:
            with torch.no_grad():
                for name, parameter in self.head.named_parameters(prefix="head"):
                    parameter.copy_(self.initial_value(name, seed=0))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules that the maps of these stages do not need, and return the stages' numbers."""
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        is_shortened = last_taken < len(self.stages) - 1
        self.stages = self.stages[: last_taken + 1]
        if is_shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        if prune_norm or is_shortened:
            self.norm = nn.Identity()
        if prune_head or is_shortened:
            self.reset_classifier(0, "")
        return taken


def read_sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of an image size: one number for both, or two.

    Raises:
        UserError: The size is anything else, or a side is below MIN_SIDE.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < MIN_SIDE:
        raise UserError(
            "img_size does not give four maps",
            got=img_size,
            expected=f"one number, or (height, width), of {MIN_SIDE} or more",
        )
    return sides[0], sides[1]


def count_poolings(height: int, width: int, window: int) -> int:
    """Count how often a map can be halved until it is smaller than a window."""
    count = 0
    while is_poolable(height, width, window):
        height, width, count = (height + 1) // 2, (width + 1) // 2, count + 1
    return count


def check_stages(windows: Sequence[int], width: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    """Check that the arguments of GCViT fit each other.

    Raises:
        UserError: They do not.
    """
    for name, value in (("depths", depths), ("num_heads", num_heads), ("windows", windows)):
        if len(value) != NUM_STAGES or min(value) < 1:
            raise UserError(f"bad {name}", got=list(value), expected="four positive numbers, one a stage")
    if min(depths) < 2:
        raise UserError(
            "a stage too shallow to use its global queries",
            got=f"depths {list(depths)}",
            expected="2 or more: a local block, then a global one",
        )
    for i, heads in enumerate(num_heads):
        dim = width * 2**i
        if dim % heads:
            raise UserError(f"num_heads of stage {i} does not divide its {dim} channels", got=heads)
