"""Compile the model part by part: the graphs stay small, and an engine's hooks run between them."""

import torch
import torch._dynamo.config as dynamo

from gcvit.model import GCViT

_GRAPHS_PER_PART = 8  # training and evaluation, and of each the sizes that a micro-batch has


def compile_parts(model: GCViT) -> None:
    """Compile the model's cut points in place, each when it first runs, and again for another batch size.

    The forward of each part is compiled, not the module, so that hooks on the module stay outside the graph. Equal
    parts share a graph: the local blocks of a stage share one, and its global blocks one. Blocks that drop path never
    drops have graphs of their own. So has every block if drop path skips images, because its rate is a size then.

    Call it after recomputation is set up, so that the compiler sees what backward computes again.
    """
    names = model.cut_points()
    # PyTorch counts the graphs of all parts of a class together, and runs what exceeds its limit uncompiled.
    limit = _GRAPHS_PER_PART * len(names)
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    dynamo.optimize_ddp = False  # it would split graphs at the borders of buckets, which are larger than parts
    for name in names:
        part = model.get_submodule(name)
        part.forward = torch.compile(
            part.forward,
            fullgraph=True,  # what cannot be compiled is an error: a broken graph would be slow without a message
            dynamic=False,  # else the maps of different stages would count as one map of dynamic size
            options={"fallback_random": True},  # drop path draws the same numbers as without compiling
        )
