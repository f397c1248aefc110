"""Class maps of ImageNet and its test sets, against timm's own lists and its judge of ReaL."""

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import RealLabelsImagenet

from gcvit.errors import UserError
from gcvit.evaluation.evaluator import judge_by_any
from gcvit.evaluation.label_sets import LABEL_SETS, find_rights, find_targets, open_set, read_list

IMAGENET = read_list("imagenet")


@dataclass
class Samples:
    """A source of one sample for each name, in class folders."""

    names: list[str]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({name.split("/")[0] for name in self.names}))

    @property
    def label(self) -> np.ndarray:
        return np.array([self.classes.index(name.split("/")[0]) for name in self.names], np.int32)

    @property
    def num_samples(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]


def right_outputs(targets) -> list[int]:
    """The model's output that is right for each sample."""
    columns = torch.arange(1000) if targets.columns is None else targets.columns
    return columns[targets.labels].tolist()


def test_the_lists_are_the_published_ones():
    assert (len(IMAGENET), len(set(IMAGENET)), IMAGENET[0]) == (1000, 1000, "n01440764")
    for subset in ("imagenet_a", "imagenet_r"):
        indices = (resources.files("timm.data") / "_info" / f"{subset}_indices.txt").read_text().split()
        assert [IMAGENET[int(index)] for index in indices] == list(read_list(subset))


@pytest.mark.parametrize("name", ["imagenet", "real", "v2", "a", "r", "sketch"])
def test_folders_are_found_by_their_names(name):
    """Some classes of the set, in an order that is not the labels'."""
    subset = LABEL_SETS[name].subset
    classes = read_list(subset) if subset else IMAGENET
    chosen = [classes[i] for i in (150, 3, 77, 3)]
    targets = find_targets(name, Samples([f"{wnid}/x{i}.jpg" for i, wnid in enumerate(chosen)]), None, 1000, "m")
    assert right_outputs(targets) == [IMAGENET.index(wnid) for wnid in chosen]
    assert targets.classes == classes
    assert (targets.columns is None) == (subset is None)
    if targets.columns is not None:
        assert len(targets.columns) == 200


def test_folders_of_v2_are_labels():
    """Sorted as text, 10 stands before 2."""
    names = [f"{label}/x.jpeg" for label in range(1000)]
    assert right_outputs(find_targets("v2", Samples(names), None, 1000, "m")) == list(range(1000))
    some = Samples(["10/a.jpeg", "2/b.jpeg", "999/c.jpeg"])
    assert right_outputs(find_targets("v2", some, None, 1000, "m")) == [10, 2, 999]


def test_a_model_with_more_classes_in_another_order():
    outputs = ["n00000001", *reversed(IMAGENET), "n00000002"]
    targets = find_targets("a", Samples(["n01498041/x.jpg"]), outputs, len(outputs), "m")
    assert [outputs[column] for column in targets.columns] == list(read_list("imagenet_a"))
    assert outputs[right_outputs(targets)[0]] == "n01498041"


@pytest.mark.parametrize(
    ("name", "samples", "outputs", "num", "words"),
    [
        ("a", ["n01440764/x.jpg"], None, 1000, "1 classes of the data are not of the set a: got n01440764"),
        ("a", ["7/x.jpg"], None, 1000, "got 7"),
        ("v2", ["1000/x.jpg"], None, 1000, "got 1000; expected: folders named n01440764 and the like, or 0 to 999"),
        ("r", ["n01443537/x.jpg"], ["cat", "dog"], 2, "lacks 200 of the 200 classes of the set r"),
        ("r", ["n01443537/x.jpg"], None, 10, "among the 10 outputs of runs/x"),
        (None, ["a/x.jpg", "b/x.jpg"], None, 3, "got 2 classes; expected: the 3 of runs/x"),
    ],
)
def test_what_does_not_fit_is_refused(name, samples, outputs, num, words):
    with pytest.raises(UserError) as caught:
        find_targets(name, Samples(samples), outputs, num, "runs/x")
    assert words in str(caught.value)


def test_classes_in_another_order_are_brought_together():
    found = find_targets(None, Samples(["ape/0", "bee/0"]), ("bee", "ape"), 2, "m")
    assert (found.classes, found.columns, found.labels.tolist()) == (("bee", "ape"), None, [1, 0])


def test_without_a_set_the_classes_are_the_data_s():
    targets = find_targets(None, Samples(["dog/x.jpg", "cat/x.jpg"]), None, 2, "m")
    assert (targets.classes, targets.columns, targets.labels.tolist()) == (("cat", "dog"), None, [1, 0])


@pytest.mark.parametrize("suffix", [".JPEG", ""])
def test_real_labels_are_judged_as_timm_does(suffix):
    """timm's judge goes through the images in their order; the first one has no label at all."""
    judge = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)])
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    for row in range(0, 40, 2):  # as they are, hardly any is right
        labels = judge.real_labels[f"ILSVRC2012_val_{row + 1:08d}.JPEG"]
        logits[row, labels[-1:]] += 4
    judge.add_result(logits)
    source = Samples([f"n01440764/ILSVRC2012_val_{i + 1:08d}{suffix}" for i in range(40)])
    targets = find_rights(find_targets("real", source, None, 1000, "m"), source)
    is_labelled = targets.rights[:, 0] >= 0
    assert not is_labelled[0]
    ranks, _ = judge_by_any(logits, targets.rights.clamp(min=0))
    for k in (1, 5):
        found = (ranks < k)[is_labelled]
        assert 100 * found.double().mean().item() == pytest.approx(judge.get_accuracy(k))
        assert 0 < found.sum() < len(found)


def test_real_labels_go_by_the_names_of_the_images():
    for name in ("n01440764/cat.jpg", "n01440764/ILSVRC2012_val_00050001.JPEG"):
        source = Samples([name])
        with pytest.raises(UserError, match=f"got {name}"):
            find_rights(find_targets("real", source, None, 1000, "m"), source)


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(path)


def test_a_set_lies_in_its_folder_or_in_a_split_of_it(tmp_path):
    save_image(tmp_path / "bare=1/n01498041/x.png")
    save_image(tmp_path / "split/val/n01498041/x.png")
    bare = open_set(f"a={tmp_path}/bare=1", "val")
    assert (bare.name, bare.label_set, bare.dir, bare.split) == ("a", "a", str(tmp_path), "bare=1")
    assert bare.source.classes == ("n01498041",)
    split = open_set(f"a={tmp_path}/split", "val")
    assert (split.dir, split.split, split.source.num_samples) == (f"{tmp_path}/split", "val", 1)
    plain = open_set(f"{tmp_path}/split", "val")
    assert (plain.name, plain.label_set) == ("val", None)
    with pytest.raises(UserError, match="unknown label set: got imagenet-a; expected: imagenet, real"):
        open_set(f"imagenet-a={tmp_path}/split", "val")
    with pytest.raises(UserError, match="no split 'val'"):
        open_set(f"{tmp_path}/bare=1", "val")
    with pytest.raises(UserError, match="missing"):
        open_set(f"a={tmp_path}/nowhere", "val")
