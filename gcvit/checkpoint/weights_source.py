"""What is evaluated: the weights of a run, a checkpoint, an export or a file, or the average of several."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gcvit.checkpoint import resolve, store
from gcvit.config.load import parse_config
from gcvit.config.schema import DataConfig, ModelConfig
from gcvit.errors import UserError
from gcvit.export.timm_hub import WEIGHTS_FILE, choose_kind, load_export, read_label_names
from gcvit.model import GCViT, weights
from gcvit.model.fitting import StateDict, fit
from gcvit.model.variants import find_variant
from gcvit.parallel.build import build_model
from gcvit.runtime.distributed import World


@dataclass(frozen=True)
class Candidate:
    """Weights that are known to be there; `read` brings them, whole and on the CPU, on all ranks together."""

    path: str
    weights: str
    """"ema" or "model" of a run, else "export" or "file"."""
    step: int | None
    model: ModelConfig
    data: DataConfig
    """How its images are prepared."""
    classes: tuple[str, ...] | None
    """Names of its classes in the order of its outputs, where they are known."""
    run_dir: Path | None
    """The run folder that it lies in."""
    read: Callable[[World], StateDict]


def find_candidate(path: str, kind: str | None = None) -> Candidate:
    """Of a run folder (its best checkpoint), a checkpoint or an export; `kind` is "ema" or "model".

    None takes the EMA where there is one; an export has one kind. Errors: UserError where there is none.
    """
    if (Path(path) / WEIGHTS_FILE).exists():
        if kind is not None:
            raise UserError("an export holds one kind of weights", got=f"--weights {kind}", cure="leave it out")
        model, config = load_export(Path(path))
        classes, state = read_label_names(Path(path)), model.state_dict()
        return Candidate(path, "export", None, config.model, config.data, _tuple(classes), None, lambda world: state)
    if Path(path).is_file():
        raise UserError("a file of weights needs its variant", got=path, cure=f"--model NAME --checkpoint {path}")
    found = store.open_checkpoint(resolve.find_checkpoint(Path(path)))
    config = parse_config(found.info["config"], source=str(found.path))
    chosen, classes = choose_kind(found, kind), found.info.get("classes")
    folder = found.path.resolve().parent
    run_dir = folder.parent if folder == resolve.checkpoints_of(folder.parent) else None

    def read(world: World) -> StateDict:
        # The ranks divide the work of hashing; each reads all.
        return store.read_tensors(store.check(found, world), chosen)

    step = found.state.step
    return Candidate(str(found.path), chosen, step, config.model, config.data, _tuple(classes), run_dir, read)


def find_file(variant: str, path: str, *, resample: bool = False) -> Candidate:
    """Of a file of any layout; how images are prepared is said by the variant's card.

    With `resample` its bias tables may be of other windows than the variant's; `load` brings them to those of its
    size. Errors: UserError for a file that is not of that variant.
    """
    row = find_variant(variant)
    content, _ = weights.read(path)
    num_classes = weights.identify(content, path, variant)["num_classes"]
    if not num_classes:
        raise UserError("these weights have no head to classify with", got=path)
    model = ModelConfig(name=variant, num_classes=num_classes, img_size=row.img_size)
    with torch.device("meta"):
        module = build_model(model)
    state = weights.to_ours(content, module)
    fit(state, module, path, resample=resample)  # told before a GPU is touched; resampled once, by `load`
    data = DataConfig(crop_pct=row.crop_pct, eval_resize="squash" if row.crop_mode == "squash" else "crop")
    return Candidate(path, "file", None, model, data, None, None, lambda world: state)


def average(candidates: Sequence[Candidate]) -> Candidate:
    """The mean of the weights of several, a model soup (Wortsman et al., ICML 2022); of one, itself.

    Images are prepared as for the first. Errors: UserError where they are not of one architecture.
    """
    first, *others = candidates
    for other in others:
        if _architecture(other.model) != _architecture(first.model) or other.classes != first.classes:
            raise UserError(
                "only weights of one model can be averaged",
                got=f"{other.path} ({other.model.name}, {other.model.num_classes} classes, {other.model.img_size} px)",
                allowed=f"that of {first.path} ({first.model.name}, {first.model.num_classes} classes, "
                f"{first.model.img_size} px), its overrides and its classes",
            )
    if not others:
        return first

    def read(world: World) -> StateDict:
        sums = {name: tensor.double() for name, tensor in first.read(world).items()}
        for other in others:
            state = other.read(world)
            for name, total in sums.items():
                total += state[name]
        return {name: (total / len(candidates)).float() for name, total in sums.items()}

    kinds = sorted({one.weights for one in candidates})
    path = " + ".join(one.path for one in candidates)
    return Candidate(path, "+".join(kinds), None, first.model, first.data, first.classes, _only_run(candidates), read)


def load(candidate: Candidate, state: StateDict, img_size: int) -> GCViT:
    """Its model in evaluation mode at a size, on the CPU; bias tables of other windows are resampled.

    Errors: UserError for a size at which the model would be another.
    """
    with torch.device("meta"):
        model = build_model(_resized(candidate.model, img_size))
    fitting, _ = fit(state, model, candidate.path, resample=True)
    model.load_state_dict(fitting, assign=True)
    return model.eval()


def _resized(model: ModelConfig, img_size: int) -> ModelConfig:
    """The same model for another size: windows that a config names grow with it, as a variant's do."""
    overrides = model.overrides
    if overrides and overrides.windows:
        windows = tuple(math.ceil(window * img_size / model.img_size) for window in overrides.windows)
        overrides = overrides.model_copy(update={"windows": windows})
    return model.model_copy(update={"img_size": img_size, "overrides": overrides})


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 in hex of the weights: names in order, shapes, types and bytes."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        sha256.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _architecture(model: ModelConfig) -> dict[str, object]:
    return model.model_dump(include={"name", "num_classes", "img_size", "overrides"})


def _only_run(candidates: Sequence[Candidate]) -> Path | None:
    runs = {one.run_dir for one in candidates}
    return runs.pop() if len(runs) == 1 else None


def _tuple(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
