"""Fetching published weights, with the hub's client replaced: what is asked for, and what its errors become."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from gcvit.errors import UserError
from gcvit.model import VARIANTS, variants


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
    assert text.endswith(f"cure: download {file} of nvidia/GCViT yourself, and give its path")
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
