"""Fetching published weights, with the hub's client replaced: what is asked for, and what its errors become."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from gcvit.errors import UserError
from gcvit.model import VARIANTS, create_model, layouts, variants


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(variants, "try_to_load_from_cache", lambda *what: None)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_file_is_asked_for_at_its_repository(name, monkeypatch):
    asked = []

    def download(*what: str) -> str:
        asked.append(what)
        return "/cache/weights"

    monkeypatch.setattr(variants, "hf_hub_download", download)
    assert variants.fetch_weights(name) == "/cache/weights"
    assert asked == [("nvidia/GCViT", VARIANTS[name].weights_file)]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route to host\nand a second line"),
        ConnectionError("no route to host"),
        RuntimeError("no route to host"),  # as an error of the client's network library, which is no OSError
        LocalEntryNotFoundError("no route to host, and nothing in the cache"),  # what the client says when offline
    ],
)
def test_a_hub_out_of_reach_is_the_users_error(error, monkeypatch):
    def download(*what: str) -> str:
        raise error

    monkeypatch.setattr(variants, "hf_hub_download", download)
    with pytest.raises(UserError) as caught:
        variants.fetch_weights("gc_vit_tiny")
    text = str(caught.value)
    assert text.startswith("cannot fetch the published weights of gc_vit_tiny: got no route to host")
    file = VARIANTS["gc_vit_tiny"].weights_file
    assert text.endswith(f"hint: download {file} of nvidia/GCViT yourself, and give its path")
    assert "\n" not in text


def test_what_is_in_the_cache_is_taken_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(variants, "try_to_load_from_cache", lambda *what: "/cache/" + "/".join(what))
    monkeypatch.setattr(variants, "hf_hub_download", lambda *what: pytest.fail("asked the hub"))
    assert variants.fetch_weights("gc_vit_tiny") == "/cache/nvidia/GCViT/gcvit_1k_tiny.pth.tar"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [None, "0", "3"])
def test_the_licence_is_said_once_a_node(rank, monkeypatch, capsys):
    monkeypatch.setattr(variants, "hf_hub_download", lambda *what: "/cache/weights")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    variants.fetch_weights("gc_vit_large_512")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (rank != "3")
    assert all("gcvit_21k_large_512.pth.tar" in line and "CC-BY-NC-SA-4.0" in line for line in lines)


def test_pretrained_fits_classes_and_size_and_no_other_model(monkeypatch, capsys, tmp_path):
    row = replace(VARIANTS["gc_vit_tiny"], width=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    monkeypatch.setitem(VARIANTS, "gc_vit_tiny", row)
    published = create_model("gc_vit_tiny", img_size=64)
    published.init_weights(seed=5)
    torch.save({"state_dict_ema": layouts.to_official_state(published.state_dict())}, tmp_path / "tiny.pth.tar")
    monkeypatch.setattr(variants, "fetch_weights", lambda name: tmp_path / "tiny.pth.tar")

    same = create_model("gc_vit_tiny", img_size=64, pretrained=True)
    assert all(torch.equal(tensor, published.state_dict()[name]) for name, tensor in same.state_dict().items())
    assert "head" not in capsys.readouterr().err
    other = create_model("gc_vit_tiny", num_classes=5, img_size=96, pretrained=True)
    assert torch.equal(other.stem.conv.weight, published.stem.conv.weight)
    assert torch.equal(other.head.fc.weight, create_model("gc_vit_tiny", num_classes=5, img_size=96).head.fc.weight)
    assert "bias tables resampled 2 -> 3 and 4 -> 6, without its head" in capsys.readouterr().err
    with pytest.raises(UserError, match="is of another model"):
        create_model("gc_vit_tiny", img_size=64, width=8, pretrained=True)
