"""--repair leaves shards that verify passes: without the corrupt samples, or with these as they were."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import index, shard, verify
from data_prep.repair import READY, UNREADY, is_interrupted
from data_prep.shards.tar_reader import TarReader
from gcvit.data.manifest import Manifest, read_manifest
from gcvit.errors import UserError


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    shard.main([str(tree), str(tmp_path / "out"), "--shard-size", "5", "--workers", "1"])
    return tmp_path / "out"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x5A
    path.write_bytes(content)


def corruption(out: Path) -> set[int]:
    """Corruption an image, a header of an image, a label and all of a shard; return the samples."""
    manifest = read_manifest(out)
    flip(out / "train-000000.tar", int(manifest.offset[1]) + int(manifest.length[1]) // 2)
    flip(out / "train-000000.tar", int(manifest.offset[3]) - 500)
    image_end = int(manifest.offset[6]) + -(-int(manifest.length[6]) // 512) * 512
    flip(out / "train-000001.tar", image_end + 512)
    (out / "train-000002.tar").unlink()
    return {1, 3, 6, 10, 11}


def images_of(manifest: Manifest) -> list[tuple[int, bytes]]:
    found = []
    for i, entry in enumerate(manifest.shards):
        content = (manifest.root / entry.name).read_bytes()
        for sample in range(manifest.first[i], manifest.first[i + 1]):
            begin = int(manifest.offset[sample])
            found.append((int(manifest.label[sample]), content[begin : begin + int(manifest.length[sample])]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(out: Path, *options: object) -> None:
    verify.main([str(out), "--workers", "1", *map(str, options)])


def test_corrupt_samples_are_left_out(out, capsys):
    before = images_of(read_manifest(out))
    digest = read_manifest(out).digest
    lost = corruption(out)
    run(out, "--repair")
    said = capsys.readouterr().out
    assert "3 shards rewritten, 0 samples restored from the source, 5 left out, 7 remain" in said
    assert "its digest has changed: runs that began with the old one cannot resume" in said
    run(out)
    assert "7 samples of 3 classes in 2 shards, all valid" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest.digest != digest
    assert images_of(manifest) == [sample for i, sample in enumerate(before) if i not in lost]
    train = json.loads((out / "_info.json").read_bytes())["splits"]["train"]
    assert (train["num_samples"], train["shard_lengths"]) == (7, [3, 4])
    assert sorted(os.listdir(out)) == sorted(
        ["train-000000.tar", "train-000001.tar", "manifest.json", "_info.json"]
        + [f"manifest.{name}.npy" for name in manifest.columns]
    )


def test_the_source_restores_every_byte(tree, out, capsys):
    valid = contents(out)
    corruption(out)
    run(out, "--repair", "--source", tree)
    assert "5 samples restored from the source, 0 left out" in (said := capsys.readouterr().out)
    assert "the manifest is as it was" in said
    assert contents(out) == valid


def test_a_source_that_lacks_corrupt_samples_is_refused(tree, out, make_image):
    manifest = read_manifest(out)
    names = [manifest.member_name(i).split(": ")[1] for i in range(12)]
    lost = corruption(out)
    corrupt = contents(out)
    (tree / names[1]).write_bytes(make_image(999))
    (tree / f"{os.path.splitext(names[10])[0]}.jpg").unlink()  # a PNG is named .jpg in the tree
    key = os.path.splitext(names[1])[0]
    with pytest.raises(UserError, match=f"the source lacks 2 of the corrupt samples: got {key}, sample 10;"):
        run(out, "--repair", "--source", tree)
    assert contents(out) == corrupt
    run(out, "--repair")
    run(out)
    assert read_manifest(out).num_samples == 12 - len(lost)


def test_what_was_encoded_again_is_in_no_source(tree, tmp_path, make_image):
    out = tmp_path / "out"
    shard.main([str(tree), str(out), "--workers", "1", "--short-side", "6"])
    manifest = read_manifest(out)
    flip(out / "train-000000.tar", int(manifest.offset[3]) + int(manifest.length[3]) // 2)
    corrupt = contents(out)
    with pytest.raises(UserError, match="the source lacks 1 of the corrupt samples"):
        run(out, "--repair", "--source", tree)
    assert contents(out) == corrupt


def test_the_class_map_finds_a_source_without_train(tree, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    tree.rename(tmp_path / "source/val")
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    options = ("--classes", tmp_path / "classes.txt")
    shard.main([str(tmp_path / "source"), str(tmp_path / "out"), "--workers", "1", *map(str, options)])
    out = tmp_path / "out/val"
    valid, manifest = contents(out), read_manifest(out)
    flip(out / "val-000000.tar", int(manifest.offset[3]) + 100)
    with pytest.raises(UserError, match="no train folder"):
        run(out, "--repair", "--source", tmp_path / "source")
    with pytest.raises(UserError, match="--classes has no effect without --source"):
        run(out, "--repair", *options)
    run(out, "--repair", "--source", tmp_path / "source", *options)
    assert contents(out) == valid


def test_files_with_the_same_bytes_are_told_apart(tree, tmp_path):
    shutil.copyfile(tree / "a/1.jpg", tree / "a/twin.jpg")
    out = tmp_path / "out"
    shard.main([str(tree), str(out), "--workers", "1"])
    valid, manifest = contents(out), read_manifest(out)
    names = [manifest.member_name(i).split(": ")[1] for i in range(13)]
    for name in ("a/1.jpg", "a/twin.jpg"):
        flip(out / "train-000000.tar", int(manifest.offset[names.index(name)]) + 100)
        run(out, "--repair", "--source", tree)
        assert contents(out) == valid
    flip(out / "train-000000.tar", int(manifest.offset[names.index("a/twin.jpg")]) - 500)  # its key is lost
    run(out, "--repair", "--source", tree)
    assert contents(out) == valid


def test_a_truncated_shard_keeps_its_beginning(out, capsys):
    path = out / "train-000001.tar"
    manifest = read_manifest(out)
    path.write_bytes(path.read_bytes()[: int(manifest.offset[8]) + 3])
    run(out, "--repair")
    assert "1 shards rewritten, 0 samples restored from the source, 2 left out, 10 remain" in capsys.readouterr().out
    run(out)


def test_corruption_between_samples_costs_none(out, capsys):
    valid = contents(out)
    path = out / "train-000002.tar"
    flip(path, path.stat().st_size - 5)  # in the empty blocks at the end
    run(out, "--repair")
    assert "0 left out" in capsys.readouterr().out
    assert contents(out) == valid


def test_nothing_to_repair_changes_nothing(tree, out):
    valid = contents(out)
    run(out, "--repair", "--source", tree)
    assert contents(out) == valid


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Let the `step`-th call that changes a name or flushes a file fail as a kill would; return how many there were."""
    num_calls = 0
    for name in ("replace", "rename", "fsync", "unlink"):

        def call(original, *args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls > step:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, partial(call, getattr(os, name)))
    return lambda: num_calls


def test_a_repair_is_finished_after_a_kill_at_any_step(out, tmp_path, monkeypatch, capsys):
    lost = corruption(out)
    shutil.copytree(out, tmp_path / "undisturbed")
    run(tmp_path / "undisturbed", "--repair")
    expected = contents(tmp_path / "undisturbed")
    corrupt = contents(out)
    states = set()
    for step in range(100):
        here = tmp_path / f"step-{step}"
        shutil.copytree(out, here)
        with monkeypatch.context() as patch:
            count = interrupt(patch, step)
            with suppress(KeyboardInterrupt):
                run(here, "--repair")
            # A killed process clears nothing up: what it had not renamed yet may lie there, or not.
        if count() <= step:
            break
        states.add(is_interrupted(here))
        if is_interrupted(here):
            with pytest.raises(UserError, match="a repair was interrupted"):
                run(here)
        else:  # what was to be renamed may lie there still: a killed process clears nothing up
            found = {name: data for name, data in contents(here).items() if ".tmp" not in name}
            assert found in (corrupt, expected, expected | {"_info.json": corrupt["_info.json"]})
        (here / UNREADY).mkdir(exist_ok=True)
        (here / UNREADY / "train-000000.tar").write_bytes(b"half a shard")
        run(here, "--repair")
        assert {name: data for name, data in contents(here).items() if ".tmp" not in name} == expected
    else:
        raise AssertionError("it never ended")
    assert states == {False, True}
    assert lost


def test_what_cannot_be_repaired_is_left_alone(tree, out, tmp_path, monkeypatch):
    corruption(out)
    corrupt = contents(out)
    with pytest.raises(UserError, match="--source has no effect without"):
        run(out, "--source", tree)
    (tmp_path / "other/x").mkdir(parents=True)
    shutil.copyfile(tree / "a/0.jpg", tmp_path / "other/x/0.jpg")
    with pytest.raises(UserError, match="the source is not the one that was sharded"):
        run(out, "--repair", "--source", tmp_path / "other")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match="No space left on device"):
            run(out, "--repair")
    assert contents(out) == corrupt
    for path in out.glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no sample would be left"):
        run(out, "--repair")
    assert not (out / READY).exists()
    assert not (out / UNREADY).exists()


def test_a_stray_tar_is_left_and_told(out):
    corruption(out)
    (out / "stray.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="tars without a manifest are left"):
        run(out, "--repair")
    assert (out / "stray.tar").read_bytes() == b"x"
    (out / "stray.tar").unlink()
    run(out)


@pytest.mark.parametrize("options", [[], ["--checksums"]])
def test_tars_of_others_are_repaired_behind_their_links(out, tmp_path, options):
    """Two splits in one folder: the manifests lie beside links, and the tars themselves are rewritten."""
    there = tmp_path / "others"
    there.mkdir()
    for i, name in enumerate(["x-train-0.tar", "x-train-1.tar", "x-validation-0.tar"]):
        shutil.copyfile(out / f"train-{i:06d}.tar", there / name)
    index.main([str(there), "--workers", "1", *options])
    run(there)
    before = images_of(read_manifest(there / "train"))
    manifest = read_manifest(there / "train")
    flip(there / "x-train-1.tar", int(manifest.offset[6]) + 2)  # the image's marks: no checksum is needed
    with pytest.raises(UserError, match="corrupt"):
        run(there)
    run(there, "--repair")
    run(there)
    assert images_of(read_manifest(there / "train")) == before[:6] + before[7:]
    assert os.readlink(there / "train/x-train-1.tar") == "../x-train-1.tar"
    assert (read_manifest(there / "train").crc32 is None) == (options == [])
    index.main([str(there), "--workers", "1", *options])
    if not options:
        flip(there / "x-train-1.tar", int(read_manifest(there / "train").offset[5]) + 2)
        with pytest.raises(UserError, match="no checksums to find the right bytes by"):
            run(there, "--repair", "--source", out)


def refuse(out: Path, words: str) -> None:
    """A repair says these words and changes nothing."""
    before = contents(out)
    with pytest.raises(UserError, match=words):
        run(out, "--repair")
    assert contents(out) == before


def test_a_shard_that_cannot_be_read_is_kept(out, monkeypatch):
    flip(out / "train-000000.tar", int(read_manifest(out).offset[1]) + 50)
    for number in (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE):

        def fail(tar: TarReader, path: Path, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(TarReader, "__init__", fail)
            refuse(out, f"may be valid: got train-000000.tar: cannot be read: {os.strerror(number)}")
    run(out, "--repair")


def test_a_link_to_a_disk_that_is_away_is_kept(out, tmp_path):
    (out / "train-000001.tar").rename(tmp_path / "away.tar")
    (out / "train-000001.tar").symlink_to(tmp_path / "absent/away.tar")
    refuse(out, r"train-000001.tar: cannot be read: No such file")
    assert (out / "train-000001.tar").is_symlink()


def test_a_link_to_another_disk_is_refused(out, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (out / "train-000000.tar").rename(tmp_path / "disk/0.tar")
    (out / "train-000000.tar").symlink_to(tmp_path / "disk/0.tar")
    flip(tmp_path / "disk/0.tar", int(read_manifest(out).offset[1]) + 50)
    stat = Path.stat

    def other_device(path: Path, **options: bool) -> os.stat_result:
        found = stat(path, **options)
        return os.stat_result([*found[:2], found.st_dev + 1, *found[3:]]) if path == tmp_path / "disk" else found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", other_device)
        refuse(out, r"train-000000.tar -> .*/disk/0.tar; expected: tars on the disk of")
    assert not is_interrupted(out)
    run(out, "--repair")


def test_a_repair_that_cannot_be_finished_says_so(out, monkeypatch):
    corruption(out)

    replace = os.replace

    def fail(old: Path, new: Path) -> None:
        if Path(old).parent.name != READY:
            return replace(old, new)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=f"cannot finish a repair: .*{os.strerror(errno.EXDEV)}"):
            run(out, "--repair")
    assert is_interrupted(out)
    run(out, "--repair")
    run(out)


def test_labels_keep_their_meaning(out):
    corruption(out)
    run(out, "--repair")
    manifest = read_manifest(out)
    for i in range(manifest.num_samples):
        name = manifest.member_name(i).split(": ")[1]
        assert manifest.classes[int(manifest.label[i])] == name.split("/")[0]
    assert np.all(manifest.label < 3)
    assert json.loads((out / "manifest.json").read_bytes())["num_samples"] == 7


cut = st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 8), st.binary(max_size=2000))
# Of one shard nothing is cut: if a single sample were left of all shards, the members that it lost were unknown.
cuts = st.lists(cut, min_size=1, max_size=4).filter(lambda cuts: len({cut[0] for cut in cuts}) < 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts)
def test_whatever_the_corruption_a_repair_leaves_sound_shards(out, tree, corruptions):
    """Bytes cut out of shards and others put in: what is left afterwards is valid, and as it was."""
    before = images_of(read_manifest(out))
    valid = contents(out)
    for i, block, num_blocks, data in corruptions:
        path = out / f"train-{i:06d}.tar"
        content = path.read_bytes()
        path.write_bytes(content[: 512 * block] + data + content[512 * (block + num_blocks) :])
    try:
        copy = out.parent / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        try:
            run(copy, "--repair")
            run(copy)
            after = images_of(read_manifest(copy))
            assert all(sample in before for sample in after)
        except UserError as error:
            assert "no sample would be left" in str(error)  # noqa: PT017
        run(out, "--repair", "--source", tree)
        assert contents(out) == valid
    finally:
        for name, data in valid.items():
            (out / name).write_bytes(data)
