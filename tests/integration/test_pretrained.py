"""Published weights: fetched from a server on loopback, by real processes, through the hub's own client."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gcvit.model import GCViT, create_model, layouts
from tests.helpers.hub_server import HubServer, serve_hub
from tests.helpers.launching import ROOT, environment, python, succeed

NAME, FILE = "gc_vit_xxtiny", "nvidia/GCViT/gcvit_1k_xxtiny.pth.tar"
# Prints, of each model that it is told to build, a sum over the stem, over a bias table and over the head.
BUILD = """
import json, sys, timm
from gcvit.runtime.entrypoint import run_main
from gcvit.model import create_model
def main():
    for arguments in json.loads(sys.argv[1]):
        build = timm.create_model if arguments.pop("by_timm", False) else create_model
        model = build("gc_vit_xxtiny", pretrained=True, **arguments)
        parts = [model.stem.conv.weight, model.stages[0].blocks[0].attention.bias_table, model.head.fc.weight]
        print(json.dumps([part.double().abs().sum().item() for part in parts]))
run_main(main)
"""


@pytest.fixture(scope="module")
def published() -> GCViT:
    model = create_model(NAME)
    model.init_weights(seed=5)
    return model


@pytest.fixture(scope="module")
def hub(published: GCViT) -> Iterator[HubServer]:
    content = io.BytesIO()
    torch.save({"state_dict": layouts.to_official_state(published.state_dict()), "epoch": 319}, content)
    with serve_hub({FILE: content.getvalue()}) as server:
        yield server


def settings(cache: Path, url: str) -> dict[str, str]:
    # -1 makes the hub's client show its progress to others than terminals too.
    return {"HF_HOME": str(cache), "HF_ENDPOINT": url, "TQDM_POSITION": "-1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def build(cache: Path, url: str, *models: dict[str, Any], **extra: str) -> tuple[list[list[float]], str]:
    done = succeed(python("-c", BUILD, json.dumps(models), **settings(cache, url), **extra))
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def sums(model: GCViT) -> list[float]:
    parts = model.stem.conv.weight, model.stages[0].blocks[0].attention.bias_table, model.head.fc.weight
    return [part.double().abs().sum().item() for part in parts]


@pytest.mark.slow
def test_fetched_once_then_from_the_cache_and_offline(hub: HubServer, published: GCViT, tmp_path: Path) -> None:
    expected = sums(published)
    found, said = build(tmp_path, hub.url, {})
    assert found == [expected]
    assert said.count("CC-BY-NC-SA-4.0") == 1
    assert "gcvit_1k_xxtiny.pth.tar: 100%" in said  # the progress bar
    assert "official layout, state_dict, 226 tensors" in said
    assert (hub.asked[f"HEAD {FILE}"], hub.asked[f"GET {FILE}"]) == (1, 1)

    # From the cache; then timm's own way, which asks whether the file is still the newest.
    found, said = build(tmp_path, hub.url, {}, {"by_timm": True})
    assert found == [expected, expected]
    assert "CC-BY" not in said
    assert (hub.asked[f"HEAD {FILE}"], hub.asked[f"GET {FILE}"]) == (2, 1)

    # Without a network; other classes and another size besides.
    other = {"num_classes": 10, "img_size": 256}
    found, said = build(tmp_path, "http://127.0.0.1:9", {}, other, HF_HUB_OFFLINE="1")
    key = "stages.0.blocks.0.attention.bias_table"
    layouts.resample_bias_tables(state := {key: published.state_dict()[key]}, {key: torch.Size((225, 2))})
    fresh = sums(create_model(NAME, **other))[2]
    assert found == [expected, [expected[0], state[key].double().abs().sum().item(), fresh]]
    assert said.count("official layout") == 2
    assert "bias tables resampled 7 -> 8 and 14 -> 16, without its head" in said


@pytest.mark.slow
def test_a_server_that_is_away_or_breaks_off_is_the_users_error(tmp_path: Path) -> None:
    """Both at once: the client waits between its own attempts, half a minute in all."""
    with serve_hub({FILE: bytes(100_000)}) as cutting:
        cutting.is_cutting = True
        urls = {"away": "http://127.0.0.1:9", "cutting": cutting.url}
        processes = {
            kind: subprocess.Popen(
                [sys.executable, "-c", BUILD, "[{}]"],
                env=environment(**settings(tmp_path / kind, url)),
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for kind, url in urls.items()
        }
        for kind, process in processes.items():
            said = process.communicate(timeout=200)[1].splitlines()
            assert process.returncode == 2, said
            assert said[-1].startswith(f"error: cannot fetch the published weights of {NAME}: got "), kind
            assert said[-1].endswith(
                "hint: download gcvit_1k_xxtiny.pth.tar of nvidia/GCViT yourself, and give its path"
            )
        assert cutting.asked[f"GET {FILE}"] > 1  # it was tried again
