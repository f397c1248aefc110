"""Find and load weights to evaluate: those of a run, a checkpoint, an export or a file, or the average of several."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from gcvit.checkpoint import resolve, store
from gcvit.checkpoint.store import Checkpoint
from gcvit.config.load import parse_config
from gcvit.config.schema import Config, DataConfig, ModelConfig
from gcvit.errors import UserError
from gcvit.model import VARIANTS, GCViT, layouts, weights
from gcvit.model.fitting import StateDict, fit
from gcvit.model.from_config import build_model
from gcvit.model.variants import fetch_weights, find_variant
from gcvit.runtime.distributed import World


@dataclass(frozen=True)
class Candidate:
    """Describe weights that exist; `read` loads them, whole and on the CPU, on all ranks together."""

    path: str
    weights: str
    """"ema" or "model" of a run, else "export" or "file"."""
    step: int | None
    model: ModelConfig
    data: DataConfig
    """The preparation of its images."""
    classes: tuple[str, ...] | None
    """Names of its classes in the order of its outputs, if they are known."""
    run_dir: Path | None
    """The run folder that contains it."""
    read: Callable[[World | None], StateDict]
    """Every rank calls it; a single process passes None."""


def find_candidate(path: str, kind: str | None = None) -> Candidate:
    """Find the weights of a run folder (its best checkpoint), a checkpoint or an export.

    Args:
        kind: "ema" or "model"; None is the EMA if there is one. An export has one kind.

    Raises:
        UserError: The path has no such weights.
    """
    if (Path(path) / WEIGHTS_FILE).exists():
        if kind is not None:
            raise UserError("an export holds one kind of weights", got=f"--weights {kind}", hint="leave it out")
        model, config = load_export(Path(path))
        classes, state = read_label_names(Path(path)), model.state_dict()
        return Candidate(path, "export", None, config.model, config.data, _tuple(classes), None, lambda world: state)
    if Path(path).is_file():
        raise UserError("a file of weights needs its variant", got=path, hint=f"--model NAME --checkpoint {path}")
    found = store.open_checkpoint(resolve.find_checkpoint(Path(path)))
    config = parse_config(found.info["config"], source=str(found.path))
    chosen, classes = choose_kind(found, kind), found.info.get("classes")
    folder = found.path.resolve().parent
    run_dir = folder.parent if folder == resolve.checkpoints_of(folder.parent) else None

    def read(world: World | None) -> StateDict:
        # The ranks divide the work of hashing; each reads all.
        return store.read_tensors(store.check(found, world) if world else found, chosen)

    step = found.state.step
    return Candidate(str(found.path), chosen, step, config.model, config.data, _tuple(classes), run_dir, read)


def find_file(variant: str, path: str, *, resample: bool = False) -> Candidate:
    """Find the weights of a file of any layout. The variant's card defines how images are prepared.

    Args:
        resample: Allow bias tables of other windows than the variant's; `load` resamples them to its size.

    Raises:
        UserError: The file is not of that variant.
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
    fit(state, module, path, resample=resample)  # only to check, before a GPU is touched: `load` resamples
    data = DataConfig(crop_pct=row.crop_pct, eval_resize="squash" if row.crop_mode == "squash" else "crop")
    return Candidate(path, "file", None, model, data, None, None, lambda world: state)


def average(candidates: Sequence[Candidate]) -> Candidate:
    """Average the weights of several candidates, a model soup (Wortsman et al., ICML 2022); return a single one itself.

    Images are prepared as for the first.

    Raises:
        UserError: The candidates are not of one architecture.
    """
    first, *others = candidates
    for other in others:
        if _architecture(other.model) != _architecture(first.model) or other.classes != first.classes:
            raise UserError(
                "only weights of one model can be averaged",
                got=f"{other.path} ({other.model.name}, {other.model.num_classes} classes, {other.model.img_size} px)",
                expected=f"that of {first.path} ({first.model.name}, {first.model.num_classes} classes, "
                f"{first.model.img_size} px), its overrides and its classes",
            )
    if not others:
        return first

    def read(world: World | None) -> StateDict:
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
    """Build the candidate's model in evaluation mode on the CPU, for images of `img_size` pixels.

    Bias tables of other windows are resampled.

    Raises:
        UserError: The weights do not fit the model of that size.
    """
    with torch.device("meta"):
        model = build_model(_resized(candidate.model, img_size))
    fitting, _ = fit(state, model, candidate.path, resample=True)
    model.load_state_dict(fitting, assign=True)
    return model.eval()


def _resized(model: ModelConfig, img_size: int) -> ModelConfig:
    """Return the same model for another size: windows that a config names grow with it, as a variant's do."""
    overrides = model.overrides
    if overrides and overrides.windows:
        windows = tuple(math.ceil(window * img_size / model.img_size) for window in overrides.windows)
        overrides = overrides.model_copy(update={"windows": windows})
    return model.model_copy(update={"img_size": img_size, "overrides": overrides})


def digest(state: dict[str, Tensor]) -> str:
    """Compute the SHA-256 of the weights in hex: names in order, shapes, types and bytes."""
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


# The names that timm and the hub expect.
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


def choose_kind(found: Checkpoint, kind: str | None) -> str:
    """Choose "ema" or "model" of a checkpoint: `kind`, or if it is None the EMA if there is one.

    Raises:
        UserError: `kind` is "ema" and the checkpoint has no EMA.
    """
    has_ema = store.has_kind(found, "ema")
    if kind == "ema" and not has_ema:
        raise UserError("this run has no EMA", got=found.path, hint="take --weights model")
    return kind or ("ema" if has_ema else "model")


def load_export(folder: Path) -> tuple[GCViT, Config]:
    """Load the model of a folder that `export` wrote, and the config that it was trained with.

    Raises:
        UserError: The file is corrupt, or was not written by `export`.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError("cannot read the weights", got=f"{path} ({error})") from None
    if "config" not in metadata:
        raise UserError(
            "the file does not say how its model was built",
            got=path,
            expected="what python -m gcvit.export wrote",
            hint="give its variant: --model NAME --checkpoint FILE",
        )
    try:
        plain = json.loads(metadata["config"])
    except ValueError as error:
        raise UserError("the file's config is corrupt", got=f"{path} ({error})") from None
    config = parse_config(plain, source=str(path))
    model = build_model(config.model)
    layouts.load(model, path)
    return model, config


def read_label_names(folder: Path) -> list[str] | None:
    """Read the classes in label order from an export's config.json.

    Raises:
        UserError: The file is corrupt.
    """
    path = folder / CONFIG_FILE
    try:
        names: list[str] | None = json.loads(path.read_text()).get("label_names")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError("cannot read the names of the classes", got=f"{path} ({error})") from None
    return names


PUBLISHED = "the published weights of"


def describe_origin(source: str) -> str:
    """Describe the origin of the weights that `--init-from` names, without folders of this machine.

    `source` is as in `gcvit.training.resume.load_weights`.

    Raises:
        UserError: As in `find_checkpoint`.
    """
    path = Path(source)
    if path.is_dir():
        found = store.open_checkpoint(resolve.find_checkpoint(path))
        return _tell(f"those of {found.info['config']['tag']} at step {found.state.step}", found.state.initial_weights)
    published = [name for name, row in VARIANTS.items() if source == name or path.name == row.weights_file]
    if published:
        return f"{PUBLISHED} {published[0]}"
    earlier = None
    if path.suffix == ".safetensors" and path.is_file():
        with safetensors.safe_open(path, "pt") as file:
            earlier = (file.metadata() or {}).get("initial_weights")
    return _tell(f"those of {path.name}", earlier)


def _tell(now: str, earlier: str | None) -> str:
    return now if earlier is None else f"{now}, which began with {earlier}"


@dataclass(frozen=True)
class Classifier:
    """Hold a model in evaluation mode, the preparation of its images, and the names of its classes in label order."""

    model: GCViT
    data: DataConfig
    classes: tuple[str, ...]
    origin: str  # of the weights, in words


def open_classifier(source: str, variant: str | None = None, attention: str = "auto") -> Classifier:
    """Open the classifier that `--checkpoint` names, on the CPU in fp32.

    Args:
        variant: The variant of a weights file; None reads it from the shapes.
        attention: A path of `WindowAttention`.

    Raises:
        UserError: The source is no classifier, is corrupt, or has no head.
    """
    if Path(source).is_dir():
        if variant is not None:
            raise UserError("a run says itself which model it is", got=f"--model {variant}", hint="leave it out")
        return _open_folder(source, attention)
    if not Path(source).exists():
        if source not in VARIANTS:
            expected = f"a run, an export, a weights file, or one of {', '.join(VARIANTS)}"
            raise UserError("no such checkpoint", got=source, expected=expected)
        variant, source = source, fetch_weights(source)
    model, variant, found = weights.read_model(source, variant, attention=attention)
    if not model.num_classes:
        raise UserError("these weights have no head to classify with", got=source)
    row = VARIANTS[variant]
    data = DataConfig(crop_pct=row.crop_pct, eval_resize="squash" if row.crop_mode == "squash" else "crop")
    return Classifier(model.float().eval(), data, name_classes(None, model.num_classes), found)


def _open_folder(path: str, attention: str) -> Classifier:
    found = find_candidate(path)
    with torch.device("meta"):
        model = build_model(found.model.model_copy(update={"attention": attention}))
    model.load_state_dict(found.read(None), assign=True)
    origin = f"{found.path}: {found.weights} of {found.model.name}"
    return Classifier(model.eval(), found.data, name_classes(found.classes, model.num_classes), origin)


def name_classes(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return a readable name for each class.

    A WordNet number (n02123045) becomes its words. If `classes` is None, 1000 classes have ImageNet-1K's names, and any
    other number of classes has "class 0", "class 1" and so on.

    Returns:
        Names in the order of the labels.
    """
    imagenet = ImageNetInfo()
    if classes is None:
        if num_classes != imagenet.num_classes():
            return tuple(f"class {label}" for label in range(num_classes))
        classes = imagenet.label_names()
    words = imagenet.label_descriptions(as_dict=True)
    return tuple(words.get(name, name) for name in classes)
