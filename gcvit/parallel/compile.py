"""torch.compile, part by part: the graphs stay small, and an engine's hooks run between them."""

import torch
import torch._dynamo.config as dynamo

from gcvit.model import GCViT

_GRAPHS_PER_PART = 8  # training and evaluation, and of each the sizes that a micro-batch has


def compile_parts(model: GCViT) -> None:
    """Compile the model's cut points in place, each when it first runs, and again for another batch size.

    Of each part the forward is compiled and not the module, so that hooks on the module stay outside. Parts that are
    alike share a graph: a stage's local blocks one and its global blocks one, but for those that are never dropped, and
    where drop path skips, since a rate is then a size. Call it after recomputation is
    set up, so that the compiler sees what backward shall compute again.
    """
    names = model.cut_points()
    # PyTorch counts the graphs of all parts of a class together, and runs what exceeds its limit uncompiled.
    limit = _GRAPHS_PER_PART * len(names)
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    dynamo.optimize_ddp = False  # it would cut graphs at the borders of buckets, which are larger than parts
    for name in names:
        part = model.get_submodule(name)
        part.forward = torch.compile(
            part.forward,
            fullgraph=True,  # what cannot be compiled is an error: half a graph would be slow in silence
            dynamic=False,  # else the stages' differing maps would be taken for one map of changing size
            options={"fallback_random": True},  # drop path draws as without compiling
        )
