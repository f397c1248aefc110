"""Which flags of evaluate.py do not go together: told before torch is loaded."""

import subprocess
import sys

import pytest

from gcvit.config import evaluate_cli
from gcvit.errors import UserError
from tests.helpers.launching import ROOT, environment

DATA = ["--data_dir", "d"]
FILE = ["--model", "m", "--checkpoint", "f"]


def check(words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    evaluate_cli.check(evaluate_cli.parse_arguments(None))


@pytest.mark.parametrize(
    "words",
    [
        ["runs/a", *DATA],
        ["runs/a", *DATA, "--data_dir", "v2=e", "--weights", "both", "--tta", "flip"],
        ["runs/a", "runs/b", "--average", *DATA],
        [*DATA, *FILE, "g", "--average"],
        [*DATA, *FILE, "--img-size", "224,256", "--crop-pct", "1"],
        ["runs/a", "--benchmark", "--batch-size", "1,2", "--img-size", "256"],
    ],
)
def test_what_goes_together(words, monkeypatch):
    check(words, monkeypatch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (DATA, "what to evaluate?"),
        (["runs/a", *FILE, *DATA], "what to evaluate?"),
        (["--model", "m", *DATA], "what to evaluate?"),
        (["runs/a", "runs/b", *DATA], "several weights at once: got 2 RUNs or FILEs; hint: add --average"),
        (["runs/a", "--average", *DATA], "--average is of several: got 1"),
        ([*FILE, *DATA, "--weights", "ema"], "a file holds one kind of weights: got --weights ema"),
        (["runs/a"], "no data; hint: give --data_dir"),
        (["runs/a", "--benchmark", *DATA], "--benchmark uses no images"),
        (["runs/a", "--benchmark", "--tta", "flip"], "no effect with --benchmark: got --tta"),
        (["runs/a", "--benchmark", "--split", "train", "--cache_bytes", "3"], "benchmark: got --cache_bytes, --split"),
        (["runs/a", "--data_dir", ""], "--data_dir is empty; hint"),
        (["runs/a", "--data_dir", "real="], "--data_dir is empty; hint"),
        (["runs/a", *DATA, "--batch-size", "0"], "--batch-size: got 0; expected: 1 or more"),
        (["runs/a", *DATA, "--batch-size", "1,2"], "--batch-size: got 1,2"),
        (["runs/a", "--benchmark", "--batch-size", "1,0"], "--batch-size: got 1,0"),
        (["runs/a", *DATA, "--img-size", "64,64"], "--img-size: got 64,64; expected: different sizes"),
        (["runs/a", *DATA, "--crop-pct", "87.5"], "--crop-pct: got 87.5; expected: above 0, at most 1"),
    ],
)
def test_what_does_not(words, message, monkeypatch):
    with pytest.raises(UserError) as caught:
        check(words, monkeypatch)
    assert message in str(caught.value)


def test_help_loads_no_torch():
    code = "import sys, evaluate; sys.argv = ['evaluate.py', '--help']\ntry: evaluate.main()\nfinally: "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--benchmark" in done.stdout
