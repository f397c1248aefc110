"""Shards named with braces open the folder whose manifest lists exactly these."""

import shutil

import pytest
from webdataset.shardlists import expand_urls

from gcvit.data.shard_pattern import ShardPattern, parse_pattern
from gcvit.data.source import open_source
from gcvit.errors import UserError
from tests.unit.data.conftest import write_shards

TWO = frozenset({"train-0.tar", "train-1.tar"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a/train-{0..1}.tar", ShardPattern("https://host/a", None, TWO)),
        ("https://host/a/train/train-{0..1}.tar", ShardPattern("https://host/a", "train", TWO)),
        ("https://host/train/train-{0,1}.tar?key={1}", ShardPattern("https://host?key={1}", "train", TWO)),
        ("s3://bucket/val/train-{0..1}.tar", ShardPattern("s3://bucket", "val", TWO)),
        ("/data/train-{0..1}.tar", ShardPattern("/data", None, TWO)),
        ("train/train-{0..1}.tar", ShardPattern(".", "train", TWO)),
        ("train-{0..1}.tar", ShardPattern(".", None, TWO)),
        ("/data/train-0.tar", None),
        ("/data/{odd}", None),
        ("https://host/data?key={1}.tar", None),
    ],
)
def test_a_pattern_names_a_folder_a_split_and_shards(text, expected):
    assert parse_pattern(text) == expected


@pytest.mark.parametrize("braces", ["{000000..000146}", "{0,1}{7..9}", "{00..04..2}", "{a,b{1,2}}"])
def test_names_are_those_of_webdataset(braces):
    pattern = parse_pattern(f"https://host/data/{braces}.tar")
    assert pattern is not None
    assert pattern.names == {url.rpartition("/")[2] for url in expand_urls(f"https://host/data/{braces}.tar")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://user:secret@host/train-{0..1.tar", r"unbalanced braces.*got https://host/train-\{0\.\.1\.tar"),
        ("/data/{train,val}/{0..3}.tar", "several folders"),
    ],
)
def test_malformed_patterns_are_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_pattern(text)
    assert "secret" not in str(caught.value)


def test_a_pattern_opens_what_its_folder_opens(shard_dir, image_tree):
    write_shards(image_tree / "val", shard_dir / "val", "val", num_shards=2)
    pattern = f"{shard_dir}/train/train-{{000000..000003}}.tar"
    for split in ("train", "val"):
        assert open_source(pattern, split).digest == open_source(shard_dir, split).digest
    flat = shard_dir.with_name("flat")
    shutil.copytree(shard_dir / "train", flat)
    assert open_source(f"{flat}/train-{{000000..000003}}.tar", "train").digest == open_source(flat, "train").digest


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("{000000..000004}", r"5 shards, 1 names differ: train-000004.tar is only in the pattern.*the 4 shards"),
        ("{000001..000003}", r"3 shards, 1 names differ: train-000000.tar is only in the manifest"),
    ],
)
def test_other_shards_than_the_manifests_are_refused(shard_dir, numbers, message):
    with pytest.raises(UserError, match=message):
        open_source(f"{shard_dir}/train/train-{numbers}.tar", "train")


def test_shards_where_class_folders_lie_are_refused(image_tree):
    with pytest.raises(UserError, match="the 0 shards of"):
        open_source(f"{image_tree}/train/train-{{0..1}}.tar", "train")
