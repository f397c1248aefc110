"""The field's words in code and docs: none of the words that the project once had for them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEARCHED = (
    *("gcvit/**/*.py", "data_prep/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "*.py"),
    *("gcvit/report/page.*", "docs/*.md", "launch/*", "configs/*.yaml", "*.md", "Makefile", ".ci/run"),
)
# The word to write, and what must not stand for it. A verb of everyday English is matched in its compound alone.
FORBIDDEN = {
    "preempted, preemption signal": r"told[ _]to[ _]leave|notice to leave|\bheed(?:s|ed|ing)?\b",
    "resolve, sync, check": r"(?<![a-z])settl(?:es?|ed|ing)(?![a-z])",
    "lookup, snapshot, allocate, pop": r"\btake_shortly\b",
    "paused": r"\boff[ _]the[ _]clock\b",
    "poll, step, inspect": r"\.look\(|\blook(?:s|ed|ing)? at\b",
    "list_checkpoints, latest_valid, quarantine": r"\bcomplete ones\b|\bset[_ ]aside\b|\bsound (?:checkpoint|image)",
    "on_rank0, is_rank0": r"\b(?:on|is)_first\(",
    "chunk, shuffle buffer": r"\bopen[_ ]runs?\b|\brun_bytes\b",
    "most expensive": r"\bdearest\b",
    "diverged": r"\b(?:come|comes|came|coming) apart\b",
    "hint": r"\bcure[sd]?\b",
    "warnings": r"\bdoubts\b|what there is to say\b",
    "option": r"\b(?<!triton\.)knobs?\b",
    "corrupt": r"\bdamag(?:e[sd]?|ing)\b",
    "measured, simulated": r"\bby trial\b|\bplayed (?:again|through|back)\b|\bplays? through\b",
    "overfitted": r"learn(?:ed|s)?[ _]by[ _]heart",
}
# These name an old option or an old word, in order to say what it is now.
NAMES_OLD_WORDS = {"gcvit/config/load.py", "tests/unit/config/test_load.py", "CHANGELOG.md", "CONTRIBUTING.md"}
# Files that still have such a word. Strike out what is done; nothing is added.
UNFINISHED: set[str] = {
    "tests/integration/bad_input/test_checkpoint.py",
    "tests/integration/test_plan_cli.py",
    "tests/unit/export/test_model_card.py",
}


def find_words(text: str) -> list[str]:
    """Find the forbidden words of a text, each with its line number and the word to write."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {right}"
        for right, pattern in FORBIDDEN.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def find_in_files() -> dict[str, list[str]]:
    paths = {path for pattern in SEARCHED for path in ROOT.glob(pattern) if path.is_file() and path != Path(__file__)}
    found = {str(path.relative_to(ROOT)): find_words(path.read_text()) for path in sorted(paths)}
    return {name: words for name, words in found.items() if words and name not in NAMES_OLD_WORDS}


def test_no_file_has_a_forbidden_word():
    found = find_in_files()
    assert not {name: words for name, words in found.items() if name not in UNFINISHED}
    assert not UNFINISHED - found.keys(), "strike these out: they are done"


@pytest.mark.parametrize(
    "line",
    [
        "It was told to leave after step 5.",
        "signals.heed()",
        "def _settle_buckets(self):",
        "self.corruption.settle(world)",
        "with metrics.off_the_clock():",
        "profiler.look(step)",
        "an engineer looks at reports",
        "a sound checkpoint",
        "world.on_first(act)",
        "data.open_runs: 4",
        "the dearest part",
        "the run came apart",
        "a restart cannot cure it",
        "each knob",
        "damaged images",
        "found by trial",
    ],
)
def test_a_forbidden_word_is_found(line):
    assert len(find_words(f"first line\n{line}\n")) == 1
    assert find_words(f"first line\n{line}\n")[0].startswith("2: ")


@pytest.mark.parametrize(
    "line", ["triton.knobs.nvidia", "lookup(name)", "take a sample", "an unsettled question", "secured", "is_firstborn"]
)
def test_other_words_pass(line):
    assert find_words(line) == []
