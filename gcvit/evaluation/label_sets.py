"""ImageNet and its test sets: the classes that compete, and the right classes of each image.

The lists are timm's. Outputs of the model are found by the classes' names (WordNet's numbers, n01440764), so that a
model with more classes than ImageNet's is evaluated on those of the set alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from gcvit.data.folder_source import class_folders, open_folder
from gcvit.data.manifest import find_split
from gcvit.data.source import Source, open_source
from gcvit.errors import UserError


@dataclass(frozen=True)
class LabelSet:
    """A published set: its number of images, and its differences from ImageNet's validation."""

    num_samples: int
    subset: str | None = None
    """timm's list of the classes that compete; None is all 1000."""
    is_numbered: bool = False
    """Whether its folders may be named by ImageNet's labels, 0 to 999."""
    has_many_rights: bool = False
    """Whether an image may have several right classes, or none: those are left out."""


LABEL_SETS = {
    "imagenet": LabelSet(50_000),
    "real": LabelSet(50_000, has_many_rights=True),  # Beyer et al., 2020, over ImageNet's validation images
    "v2": LabelSet(10_000, is_numbered=True),  # Recht et al., 2019
    "a": LabelSet(7_500, subset="imagenet_a"),  # Hendrycks et al., 2021
    "r": LabelSet(30_000, subset="imagenet_r"),  # Hendrycks et al., 2021
    "sketch": LabelSet(50_889),  # Wang et al., 2019
}
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Targets:
    """The model's outputs that compete, and the right ones for each sample of a source."""

    classes: tuple[str, ...]
    """Names of the K classes that compete."""
    columns: Tensor | None
    """int64 [K], the model's output of each; None where they are all its outputs, in this order."""
    labels: Tensor
    """int64 [N], the class of each sample's folder."""
    rights: Tensor | None = None
    """int64 [N, R], the right classes where they are others, the first one repeated; -1 for a sample without any."""

    def to(self, device: torch.device) -> "Targets":
        labels = self.labels.to(device)
        return replace(self, labels=labels, rights=None if self.rights is None else self.rights.to(device))


@dataclass(frozen=True)
class ImageSet:
    """The images in dir/split, of a published set or of a model's own data (`label_set` is None)."""

    name: str
    label_set: str | None
    dir: str
    split: str
    source: Source

    @property
    def has_many_rights(self) -> bool:
        return self.label_set is not None and LABEL_SETS[self.label_set].has_many_rights


def open_set(given: str, split: str, cache_dir: str | None = None, cache_bytes: int | None = None) -> ImageSet:
    """Open the set of `--data_dir [SET=]DIR`. The class folders of a published set may lie in DIR itself.

    Raises:
        UserError: The set is unknown, or as `open_source`.
    """
    name, equals, place = given.partition("=")
    if not equals or "/" in name:
        return ImageSet(split, None, given, split, open_source(given, split, cache_dir, cache_bytes))
    if name not in LABEL_SETS:
        raise UserError("unknown label set", got=name, expected=f"{', '.join(LABEL_SETS)}, or a folder alone")
    folder = Path(place).absolute()
    has_split = (folder / split).is_dir() or find_split(folder, split) is not None
    if folder.is_dir() and class_folders(folder) and not has_split and not cache_dir:
        return ImageSet(name, name, str(folder.parent), folder.name, open_folder(folder))
    return ImageSet(name, name, place, split, open_source(place, split, cache_dir, cache_bytes))


def find_targets(
    set_name: str | None, source: Source, outputs: Sequence[str] | None, num_outputs: int, model: str
) -> Targets:
    """Match the classes of a source with the outputs of a model.

    `outputs` names the model's classes in their order where they are known, and `model` the model, for messages.
    Without a set the source's classes are the outputs. If a set has several right classes an image, `find_rights` adds
    them.

    Raises:
        UserError: Classes are not of the set, or the model lacks them.
    """
    labels = torch.from_numpy(source.label.astype("int64"))
    if set_name is None:
        if len(source.classes) != num_outputs:
            raise UserError(
                "the data has another number of classes than the model",
                got=f"{len(source.classes)} classes",
                expected=f"the {num_outputs} of {model}",
                hint="give the data that it was trained for, or name the set: --data_dir SET=DIR with "
                + ", ".join(LABEL_SETS),
            )
        if outputs and set(outputs) == set(source.classes):  # their order may be another
            output_of = {name: output for output, name in enumerate(outputs)}
            labels = torch.tensor([output_of[name] for name in source.classes])[labels]
            return Targets(tuple(outputs), None, labels)
        return Targets(tuple(source.classes), None, labels)
    chosen, imagenet = LABEL_SETS[set_name], read_list("imagenet")
    classes = imagenet if chosen.subset is None else read_list(chosen.subset)
    names = list(imagenet) if outputs is None and num_outputs == len(imagenet) else list(outputs or ())
    output_of = {name: output for output, name in enumerate(names)}
    if missing := [name for name in classes if name not in output_of]:
        raise UserError(
            f"the model lacks {len(missing)} of the {len(classes)} classes of the set {set_name}",
            got=f"no {missing[0]} among the {num_outputs} outputs of {model}",
            hint="evaluate a model that was trained on ImageNet, with classes named n01440764 and the like",
        )
    label_of = {name: label for label, name in enumerate(classes)}
    if chosen.is_numbered and all(name.isdecimal() for name in source.classes):
        label_of = {str(label): label for label in range(len(classes))}
    if unknown := [name for name in source.classes if name not in label_of and _is_used(name, source)]:
        raise UserError(
            f"{len(unknown)} classes of the data are not of the set {set_name}",
            got=", ".join(unknown[:3]),
            expected="folders named n01440764 and the like" + (", or 0 to 999" if chosen.is_numbered else ""),
            hint="check which set the folder holds",
        )
    of_source = torch.tensor([label_of.get(name, -1) for name in source.classes])
    columns = [output_of[name] for name in classes]
    is_whole = columns == list(range(num_outputs))
    return Targets(classes, None if is_whole else torch.tensor(columns), of_source[labels])


def find_rights(targets: Targets, source: Source) -> Targets:
    """Add the right classes of ImageNet ReaL, which are found by the images' names.

    Raises:
        UserError: An image's name is not of ImageNet's validation.
    """
    from timm.data import RealLabelsImagenet

    real = RealLabelsImagenet(range(LABEL_SETS["real"].num_samples)).real_labels
    rights = []
    for index in range(source.num_samples):
        name = source.name(index)
        found = _VAL_IMAGE.search(name)
        labels = real.get(f"{found[0]}.JPEG") if found else None
        if labels is None:
            raise UserError(
                "the labels of ImageNet ReaL go by the names of the images",
                got=name,
                expected="ILSVRC2012_val_00000001 to ILSVRC2012_val_00050000",
                hint="give ImageNet's validation images under their own names, from a folder or shards on a disk",
            )
        rights.append(labels)
    most = max(1, *map(len, rights))
    rows = [[*labels, *[labels[0] if labels else -1] * (most - len(labels))] for labels in rights]
    return replace(targets, rights=torch.tensor(rows))


def read_list(name: str) -> tuple[str, ...]:
    """Read one of timm's lists of classes, such as imagenet_a, in the order of its labels."""
    text = (resources.files("timm.data") / "_info" / f"{name}_synsets.txt").read_text()
    return tuple(text.split())


def _is_used(name: str, source: Source) -> bool:
    return bool((source.label == source.classes.index(name)).any())
