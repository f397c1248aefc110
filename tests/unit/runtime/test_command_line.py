"""Commands parse alike."""

import pytest

from gcvit.errors import UserError
from gcvit.runtime.command_line import check_at_least_one, command_parser


def test_the_help_names_the_command_and_keeps_its_lines(capsys):
    parser = command_parser("gcvit.x", "FILE [flags]", "One line.\n\n    python -m gcvit.x a\n")
    parser.add_argument("--option")
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m gcvit.x FILE [flags]\n")
    assert "\n    python -m gcvit.x a\n" in shown
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--opt", "1"])


def test_counts_below_one_are_refused():
    check_at_least_one(workers=1, short_side=None)
    with pytest.raises(UserError, match=r"--short-side is too small: got 0; expected: at least 1"):
        check_at_least_one(workers=1, short_side=0)
