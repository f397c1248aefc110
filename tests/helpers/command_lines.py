"""Find the commands of texts in Markdown, and parse them by the tool that they start, without running it."""

import importlib
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from torch.distributed.run import get_args_parser as torchrun_parser

NEEDS = "# needs "


@dataclass(frozen=True)
class Command:
    """Describe one command of a text, on one line; `needs` is the marker's text, None if a laptop can run it."""

    line: str
    needs: str | None


def find_blocks(text: str, language: str) -> list[str]:
    """Find the fenced blocks of this language."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def find_commands(text: str) -> list[Command]:
    """Find the commands of all bash blocks, in order."""
    commands = []
    for block in find_blocks(text, "bash"):
        needs = None
        for line in map(str.strip, re.sub(r" *\\\n *", " ", block).splitlines()):
            if line.startswith(NEEDS):
                needs = line.removeprefix(NEEDS)
            elif line and not line.startswith("#"):
                commands.append(Command(line, needs))
                needs = None
    return commands


class _Parsed(Exception):
    pass


def read_command(line: str) -> tuple[str, Namespace]:
    """Return the module that a command starts, and the arguments as its own parser reads them, without running it.

    Raises:
        SystemExit: A word is no flag of the tool, or of the launcher.
    """
    launcher, *words = shlex.split(line)
    match launcher:
        case "torchrun":
            read = torchrun_parser().parse_args(words)
            words = [read.training_script, *read.training_script_args]
        case "deepspeed":
            words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
        case "sbatch":
            words = _read_sbatch(words)
        case "python":
            pass
        case _:
            raise AssertionError(f"no tool of ours: {line}")
    module = words[1] if words[0] == "-m" else Path(words[0]).stem
    rest = words[2:] if words[0] == "-m" else words[1:]
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [words[0], *rest]))
        for name in ("parse_args", "parse_intermixed_args"):
            stack.enter_context(patch.object(ArgumentParser, name, _stop_after(getattr(ArgumentParser, name))))
        try:
            is_package = importlib.import_module(module).__spec__.submodule_search_locations is not None
            importlib.import_module(f"{module}.__main__" if is_package else module).main()
        except _Parsed as parsed:
            return module, parsed.args[0]
    raise AssertionError(f"no parser was asked: {line}")


def _stop_after(parse):
    def parse_and_stop(parser, *arguments, **options):
        raise _Parsed(parse(parser, *arguments, **options))

    return parse_and_stop


def _read_sbatch(words: list[str]) -> list[str]:
    """Return the module and the words that a script of launch/ starts."""
    parser = ArgumentParser(allow_abbrev=False)
    for option in ("--nodes", "--gpus-per-node", "--time", "--array", "--cpus-per-task", "--job-name", "--dependency"):
        parser.add_argument(option)
    parser.add_argument("script")
    number = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    script = parser.parse_args(words[: number + 1]).script
    rest = words[number + 1 :]
    if script == "launch/train.sbatch":
        for option in ("--engine-launcher", "--stage"):
            if option in rest:
                del rest[rest.index(option) : rest.index(option) + 2]
        return ["train.py", "--config", *rest]
    return {"launch/evaluate.sbatch": ["evaluate.py"], "launch/shard.sbatch": ["-m", "data_prep.shard"]}[script] + rest
