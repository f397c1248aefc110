"""docs/config.md follows the code: every option, its sentence, its values, and what the shipped files set."""

import re
from typing import Literal

import pytest
from pydantic import BaseModel

from docs.config_page import PAGE, describe_values, write_page
from gcvit.config import schema
from gcvit.config.schema import Config, OverridesConfig
from tests.unit.config.test_shipped_configs import FILES

PAGE_TEXT = PAGE.read_text()


def test_the_page_is_up_to_date():
    assert write_page() == PAGE_TEXT, "an option has changed: python -m docs.config_page"


def test_every_option_is_there_once():
    named = re.findall(r"^\| `([\w.]+)` \|", PAGE_TEXT, flags=re.MULTILINE)
    options = find_options("", Config)
    assert len(options) > 80
    assert sorted(named) == sorted(options)


def find_options(prefix: str, section: type[BaseModel]) -> list[str]:
    options = []
    for name, field in section.model_fields.items():
        options.append(prefix + name)
        kinds = re.findall(r"\w+Config", str(field.annotation))
        for kind in kinds:
            options += find_options(f"{prefix}{name}.", getattr(schema, kind))
    return options


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (schema.Count | None, "whole number from 1 or null"),
        (schema.BelowOne, "number from 0, below 1"),
        (schema.Share, "number from 0, to 1"),
        (schema.Length | None, "duration above 0 or null"),
        (Literal["a", 1], "`a`, `1`"),
        (tuple[schema.Positive, schema.Positive], "2 of: number above 0"),
        (OverridesConfig | None, "section or null"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_types_in_words(annotation, words):
    assert describe_values(annotation) == words


def test_files_that_differ_are_named():
    (row,) = re.findall(r"^\| `model.img_size` .*$", PAGE_TEXT, flags=re.MULTILINE)
    assert row.endswith("`224`; `64`: digits_demo; `384`: large_384; `512`: large_512 |")
    (row,) = re.findall(r"^\| `model.overrides.width` .*$", PAGE_TEXT, flags=re.MULTILINE)
    assert row.endswith("`32`: digits_demo |")  # the others have no such section
    assert len(FILES) > 10
