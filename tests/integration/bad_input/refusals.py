"""What the tests of mistakes share: how a refusal looks, and that nothing was touched."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import evaluate
import train
from gcvit.errors import UserError
from tests.helpers.launching import ROOT

CONFIG = ROOT / "tests/helpers/golden.yaml"
SHORT = ["schedule.cosine=2 steps", "schedule.warmup=0 steps", "global_batch_size=8"]
CLASSES = ("ape", "bee", "cat", "dog")


def hashes(*folders: Path) -> dict[str, str]:
    """Every file below the folders. The lock is left out: whoever holds it signs it."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The error that `main` ends with; RANK and the like are this process's own."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    with pytest.raises(UserError) as caught:
        main()
    if dist.is_initialized():  # a program that fails leaves that to its end; this process goes on
        dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)  # evaluate.py's choice, for its own process
    message = " ".join(str(caught.value).split())
    assert "; " in message or ": " in message
    return message


def expect_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]


def both(monkeypatch: pytest.MonkeyPatch, data: Path | str, finished: Path, tmp_path: Path) -> list[str]:
    """What train.py and evaluate.py say of a data directory; neither writes anything."""
    before = hashes(finished, *([Path(data)] if Path(data).is_dir() else []))
    words = ["--config", CONFIG, "--data_dir", data, f"output_dir={tmp_path / 'new'}", *SHORT]
    messages = [
        refusal(train.main, monkeypatch, *words),
        refusal(evaluate.main, monkeypatch, finished, "--data_dir", data),
    ]
    assert not list((tmp_path / "new").rglob("checkpoints/step_*")), "a checkpoint of nothing"
    assert hashes(finished, *([Path(data)] if Path(data).is_dir() else [])) == before
    return messages
