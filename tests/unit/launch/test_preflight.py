"""launch/preflight.py: which nodes are bad, from what they answer."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gcvit.errors import UserError

SCRIPT = Path(__file__).parents[3] / "launch/preflight.py"
HOSTS = [f"node{number}" for number in range(64)]
SOUND: dict[str, Any] = {
    "problems": [],
    "refused": None,
    "code": "c0de",
    "python": "3.11.2",
    "torch": "2.9",
    "data": "da7a",
    "read_mb": 900.0,
}
NOW = 1_700_000_000.0


@pytest.fixture
def judge(tmp_path, capsys):
    """The verdict over 64 nodes, of which some answer something else, or None: nothing. (code, bad ones, words)"""
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    preflight = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preflight)

    def run(**others: dict[str, Any] | None) -> tuple[int, list[str], str]:
        for host in HOSTS:
            changes = others.get(host, {})
            if changes is not None:
                path = tmp_path / f"{host}.json"
                path.write_text(json.dumps(SOUND | {"host": host, "time": NOW} | changes))
                os.utime(path, (NOW, NOW))
        code = 0
        try:
            preflight.judge(tmp_path, HOSTS)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out.strip().split(",") if said.out.strip() else [], said.err

    return run


def test_sixty_four_alike(judge):
    assert judge() == (0, [], "pre-flight: a shard is read with 900 to 900 MB/s\npre-flight: 64 nodes alike and fit\n")


def test_each_bad_one_is_named_with_its_reason(judge):
    code, bad, words = judge(
        node3={"torch": "2.8"},
        node9=None,
        node17={"problems": ["has 7 working GPUs, 8 wanted"]},
        node30={"time": NOW - 60},
        node40={"refused": "the config cannot be read"},
        node63={"code": "01d"},
    )
    assert code == 1
    assert sorted(bad) == ["node17", "node3", "node30", "node40", "node63", "node9"]
    reasons = {
        "node3": "has torch 2.8, the others 2.9",
        "node9": "does not answer",
        "node17": "has 7 working GPUs",
        "node30": "its clock is -60 s off",
        "node40": "the config cannot be read",
        "node63": "has code 01d, the others c0de",
    }
    for host, reason in reasons.items():
        assert f"bad node {host}: {reason}" in words


def test_where_all_are_bad_none_can_be_left_out(judge):
    code, bad, words = judge(**{host: {"problems": ["does not see the data"]} for host in HOSTS})
    assert (code, bad) == (1, [])
    assert words.count("bad node") == 64


def test_what_all_refuse_is_the_commands_fault(judge):
    with pytest.raises(UserError, match="unknown config key"):
        judge(**{host: {"refused": "unknown config key: got optim.lrr"} for host in HOSTS})
