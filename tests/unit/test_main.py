"""`python -m gcvit` names every tool, with an example that its parser takes; every --help is grouped and short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gcvit.__main__ import TOOLS, list_tools
from tests.helpers.command_lines import read_command
from tests.helpers.launching import ROOT

EXAMPLES = [example for tools in TOOLS.values() for example in tools.values()]
MAX_LINES, MAX_WIDTH, MAX_HELP = 60, 120, 90
# The trainer starts these itself and speaks to them by a pipe: nobody types their arguments.
STARTED_BY_US = {"gcvit.checkpoint.writer_process"}


def find_entry_points() -> list[str]:
    """The modules that are started, by the last lines of their files."""
    paths = [*ROOT.glob("gcvit/**/*.py"), *ROOT.glob("data_prep/*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    started = [path for path in paths if 'if __name__ == "__main__":' in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in started]
    assert set(names) >= STARTED_BY_US
    return sorted(name.removesuffix(".__main__") for name in set(names) - STARTED_BY_US - {"gcvit.__main__"})


def find_parser(name: str) -> Path:
    """The file that makes a tool's parser."""
    module = ROOT / name.replace(".", "/")
    cli = ROOT / f"gcvit/config/{name}_cli.py"
    places = (cli, module / "timm_hub.py", module / "__main__.py", module.with_suffix(".py"))
    return next(path for path in places if path.is_file())


ENTRY_POINTS = find_entry_points()


def test_it_is_quick_and_tells_all(capsys):
    code = "import sys, runpy; runpy.run_module('gcvit', run_name='__main__'); print(len(sys.modules)); " + (
        "print({'torch', 'numpy', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *told, _, heavy = done.stdout.splitlines()
    assert told == list_tools().splitlines()
    assert heavy == "set()"
    assert max(map(len, told)) <= 100


def test_every_tool_is_listed():
    assert {read_command(example)[0] for example in EXAMPLES} == set(ENTRY_POINTS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_tool_takes_its_example(example):
    module, arguments = read_command(example)
    assert vars(arguments)
    for word in example.split():
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()
    assert module in ENTRY_POINTS


@pytest.mark.parametrize(
    "line", ["python train.py --configs x.yaml", "python -m gcvit.export", "sbatch --nods 4 launch/train.sbatch x.yaml"]
)
def test_a_mistake_in_an_example_is_found(line):
    with pytest.raises(SystemExit):
        read_command(line)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_is_grouped_and_short(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    launcher = f"python {name}.py" if name in ("train", "evaluate") else f"python -m {name}"
    with pytest.raises(SystemExit) as stopped:
        read_command(f"{launcher} --help")
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= MAX_WIDTH
    assert any(line.strip().startswith(("python ", "torchrun ")) for line in lines), "no example"
    (options,) = [i for i, line in enumerate(lines) if line == "options:"]
    assert lines[options + 2] == "", "an option outside of a group with a title"
    assert lines[options + 3].endswith(":")


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_words_on_options_are_short(name):
    """One line each: no capital first, no full stop."""
    path = find_parser(name)
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    helps = [word.value for call in calls for word in call.keywords if word.arg == "help"]
    texts = [node.value for node in helps if isinstance(node, ast.Constant)]
    assert helps
    for text in texts:
        assert isinstance(text, str)
        assert len(text) <= MAX_HELP, text
        assert not text.endswith("."), text
        assert not text[0].isupper() or text.split()[0].isupper() or text.split()[0] in ("W&B", "SHA-256"), text
