"""Define the flags of every benchmark and its exit."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn


def make_parser(module: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """Make a parser with --quick, --check and --json; `quick` describes the quick run."""
    first_line = (description or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=first_line)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: a smoke test, no measurement")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    return parser


def conclude(
    results: dict[str, Any], misses: list[str], arguments: argparse.Namespace, verdict: str = "All bars are met."
) -> NoReturn:
    """Write the results as --json asks, print the missed bars or the verdict, and exit as --check asks."""
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\nMissed: " + "; ".join(misses) if misses else f"\n{verdict}")
    sys.exit(1 if misses and arguments.check else 0)
