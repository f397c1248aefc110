"""train.py with a defect in it: `defect_worker.py DEFECT ARGUMENTS...`, where DEFECT is none or KIND.

"output": an MLP's output is NaN for samples of class 2, which are blue. "gradient": that of its input is. "put": it
calls an operation of which torch says that it may give other bits in every run.
"""

import functools
import sys

import torch
from torch import Tensor, nn

import train
from gcvit.model import GCViT
from gcvit.parallel import build
from gcvit.runtime.entrypoint import run_main


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, rows: Tensor) -> Tensor:
        context.rows = rows
        return x.clone()

    @staticmethod
    def backward(context, gradient: Tensor):
        return torch.where(context.rows.view(-1, *[1] * (gradient.ndim - 1)), torch.nan, gradient), None


MODULE = "stages.1.blocks.1.mlp"


def plant(model: GCViT, kind: str) -> None:
    part = model.get_submodule(MODULE)
    rows = []

    def find_rows(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[:] = [(inputs[0].float().mean((2, 3)).argmax(1) == 2) & model.training]

    forward = part.forward

    def spoiled(x: Tensor, *others: Tensor) -> Tensor:
        if kind == "gradient":
            return forward(_SpoilGradient.apply(x, rows[0]), *others)
        if kind == "put":
            torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))
            return forward(x, *others)
        output = forward(x, *others)
        return torch.where(rows[0].view(-1, *[1] * (output.ndim - 1)), torch.nan, output)

    model.register_forward_pre_hook(find_rows)
    part.forward = spoiled


def build_defective(build_model, kind: str, config) -> GCViT:
    model = build_model(config)
    plant(model, kind)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    defect = sys.argv.pop(1)
    if defect != "none":
        build.build_model = functools.partial(build_defective, build.build_model, defect)
    run_main(train.main)
