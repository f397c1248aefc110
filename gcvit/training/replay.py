"""Repeat one step of a run (`train.py --replay STEP`), and find the first sample and module that are not finite.

The run's folder is only read. A scratch run starts from its newest checkpoint before the step, repeats the steps up to
it as in training, and inspects every module's output and gradient in the step itself.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from gcvit.checkpoint import store
from gcvit.checkpoint.format import step_dir
from gcvit.checkpoint.resolve import checkpoints_of, find_checkpoint
from gcvit.config.schema import Config
from gcvit.data.batch import Batch
from gcvit.data.source import Source
from gcvit.errors import UserError
from gcvit.optim.adamw import MODEL
from gcvit.runtime.distributed import World
from gcvit.training.setup import build_trainer
from gcvit.training.trainer import StepOutput, Trainer

_NUM_LISTED = 5  # weights that are not finite


def replay(
    config: Config,
    world: World,
    sources: tuple[Source, Source],
    step: int,
    *,
    resume: str = "auto",
    init_from: str | None = None,
    reset_head: bool = False,
) -> None:
    """Print what step number `step` (counted as in the log, from 1) of the run that `config` names computes.

    Every rank calls it.

    Args:
        resume: "auto" is the run's newest checkpoint before the step.

    Raises:
        UserError: There is none, and as `build_trainer`.
    """
    chosen = world.on_rank0(lambda: find_before(config.run_dir, step)) if resume == "auto" else resume
    messages = ["replay: torch.compile is off, so that every module can be inspected"] if config.compile else []
    if chosen != "none":
        num_trained = world.on_rank0(lambda: store.open_checkpoint(find_checkpoint(Path(chosen))).info["world_size"])
        if num_trained != world.size:
            difference = f"replay: on {world.size} processes, where {num_trained} trained"
            messages.append(f"{difference}: drop path falls otherwise, and sums differ in the last bits")
    with ExitStack() as stack:
        folder = world.on_rank0(lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="replay-")))
        scratch = config.model_copy(update={"output_dir": folder, "compile": False, "ema": None, "wandb": False})
        built = build_trainer(
            scratch,
            world,
            sources,
            resume=chosen,
            init_from=init_from,
            reset_head=reset_head,
            messages=messages,
            log_to_files=False,  # the scratch folder exists on one node
        )
        trainer = stack.enter_context(built)
        state = trainer.state
        if not state.step < step <= trainer.schedule.total_steps:
            raise UserError(
                "there is no such step to replay",
                got=f"--replay {step}",
                expected=f"{1 if resume == 'auto' else state.step + 1} to {trainer.schedule.total_steps}",
            )
        for batches in islice(trainer.stream, step - 1 - state.step):
            trainer.train_step(batches)
            state.step, state.samples = state.step + 1, state.samples + config.global_batch_size
        bad_weights = _find_bad_weights(trainer)
        batches = next(trainer.stream)
        with _inspected(trainer.engine.module) as inspector:
            output = trainer.train_step(batches)
        lines = _describe_step(trainer, output) + _describe_samples(trainer, batches, output) + bad_weights
        for rank, found in enumerate(world.gather(inspector.describe())):
            lines += [f"rank {rank}: {line}" for line in found]
        if world.is_rank0:
            print("\n".join(lines), flush=True)


def find_before(run_dir: Path, step: int) -> str:
    """Find the newest checkpoint of a run before its step number `step`.

    Raises:
        UserError: There is none.
    """
    there = [store.step_of(path) for path in store.list_checkpoints(checkpoints_of(run_dir))]
    before = [number for number in there if number < step]
    if not before:
        raise UserError(
            "no checkpoint to replay from",
            got=f"--replay {step}, and checkpoints of steps {there} in {checkpoints_of(run_dir)}",
            expected=f"a step after {there[0]}" if there else None,
            hint="--resume none replays from the beginning, with the --init-from of that time",
        )
    return str(checkpoints_of(run_dir) / step_dir(before[-1]))


class _Inspector:
    """Finds the first output that is not finite in the order of execution or, if all are, the first gradient."""

    def __init__(self) -> None:
        self._num_forwards = 0
        self._bad_output: list[str] = []
        self._bad_gradient: list[str] = []

    @torch.no_grad()
    def inspect_output(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        where = f"{name or 'the model'} ({type(module).__name__}), micro-step {self._num_forwards}"
        if not self._bad_output and not torch.isfinite(output).all():
            self._bad_output = [f"first output that is not finite: {where}: {_describe(output)}"]
            self._bad_output += [f"  its input: {_describe(tensor)}" for tensor in inputs]
            if not all(torch.isfinite(tensor).all() for tensor in inputs):
                parent = name.rpartition(".")[0] or "the model"
                self._bad_output += [f"  so it arose before, in the code of {parent} itself"]
        if output.requires_grad:
            output.register_hook(partial(self._inspect_gradient, where))
        self._num_forwards += not name

    def _inspect_gradient(self, where: str, gradient: Tensor) -> None:
        if not self._bad_gradient and not torch.isfinite(gradient).all():
            text = f"first gradient that is not finite: of the output of {where}: {_describe(gradient)}"
            self._bad_gradient = [text, "  so it arose in the backward pass of the modules after that one"]

    def describe(self) -> list[str]:
        return self._bad_output or [
            "the outputs of all modules are finite",
            *(self._bad_gradient or ["the gradients of all outputs are finite"]),
        ]


@contextmanager
def _inspected(module: nn.Module) -> Iterator[_Inspector]:
    inspector = _Inspector()
    hooks = [
        part.register_forward_hook(partial(inspector.inspect_output, name)) for name, part in module.named_modules()
    ]
    yield inspector
    for hook in hooks:
        hook.remove()


def _describe(tensor: Tensor) -> str:
    finite = tensor[torch.isfinite(tensor)].float()
    shape = " x ".join(map(str, tensor.shape))
    values = "none finite"
    if len(finite):
        values = f"{finite.min():.3g} to {finite.max():.3g}, {tensor.numel() - len(finite)} not finite"
    return f"{shape} of {str(tensor.dtype).removeprefix('torch.')}, {values}"


def _describe_step(trainer: Trainer, output: StepOutput) -> list[str]:
    loss = trainer.world.sum(output.loss_sum.clone()).item() / trainer.config.global_batch_size
    refused = "" if output.result.applied.item() else ", update REFUSED"
    number = trainer.state.step + 1
    return [f"step {number}: loss {loss:.6g}, gradient norm {output.result.grad_norm.item():.6g}{refused}"]


def _describe_samples(trainer: Trainer, batches: Sequence[Batch], output: StepOutput) -> list[str]:
    """Describe each sample of the global batch in a line, in the order of positions."""
    trainer.corruption.add(batches)
    trainer.corruption.sync(trainer.world)
    is_mixed = trainer.config.augment.is_paired
    here = []
    for batch, losses in zip(batches, output.losses, strict=True):
        labels = [trainer.train_source.classes[label] for label in batch.labels.tolist()]
        # Mixed samples are adjacent.
        labels = [f"{label} + {labels[row ^ 1]}" if is_mixed else label for row, label in enumerate(labels)]
        here += list(zip(batch.positions.tolist(), labels, losses.tolist(), strict=False))
    rows = sorted((p, rank, label, loss) for rank, of in enumerate(trainer.world.gather(here)) for p, label, loss in of)
    names = trainer.name_samples([trainer.state.samples + position for position, *_ in rows])
    return ["rank  loss        sample (label)"] + [
        f"{rank:>4}  {loss:<10.6g}  {name} ({label})" for name, (_, rank, label, loss) in zip(names, rows, strict=True)
    ]


def _find_bad_weights(trainer: Trainer) -> list[str]:
    parts = trainer.engine.fragments()[MODEL]
    here = [name for name, part in parts.items() if not torch.isfinite(part.data).all()]
    names = sorted(set().union(*trainer.world.gather(here)))
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return [f"weights that are not finite before this step: {', '.join(names[:_NUM_LISTED])}{more}"] if names else []
