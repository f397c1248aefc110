"""Write docs/config.md from `gcvit.config.schema`: each option with its sentence, its values, and what configs/ set.

    python -m docs.config_page

A test compares the page with what this writes.
"""

import argparse
import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gcvit.config import schema as options
from gcvit.config.load import load_config
from gcvit.config.schema import Config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/config.md"
INTRODUCTION = """\
# Every option

A config is one YAML file that holds only what differs from the defaults; `configs/` has examples. The command line
changes any option of it: `optim.lr=1e-3`, `ema=null`, `"schedule.cosine=90 epochs"`. The command line replaces the
file's value, and the file's value replaces the default. `runs/TAG/config.yaml` has the resolved config of a run, with
every option.

An unknown option is refused with the nearest valid name. A wrong type and an option without effect are refused too.

- **null** means "absent" or "off"; the option's sentence says which.
- A **duration** is a number and a unit: `20 epochs`, `500 steps`, `1e6 samples`. It is converted to steps once, at the
  start, so it means the same on any number of GPUs.
- **In configs/** gives the value of most files first, then the other values with their files, without `gc_vit_`.

`python -m docs.config_page` writes this page from `gcvit/config/schema.py`, and a test compares the two.
"""
MAX_VALUES = 6
# Descriptions of kinds that are clearer than their bounds, by the check that makes them.
KINDS = {
    options.Duration: "duration",
    options.Length: "duration above 0",
    options.Range: "low, high; both above 0",
    options.Profile: "`START:STEPS`",
    options.MicroBatch: "whole number from 1, `auto` or null",
}
PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", Any: "anything"}


def write_page() -> str:
    """Write the whole page as Markdown."""
    files = sorted((ROOT / "configs").glob("*.yaml"))
    shipped = {path.stem: _flatten(load_config(path)[0].model_dump(mode="json")) for path in files}
    return INTRODUCTION + "".join(
        _write_section(name, section, shipped) for name, section in _find_sections("", Config)
    )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree to values by dotted key; a section that is null is its own value, and has no options."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _find_sections(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield all sections with their dotted names, each before those inside it."""
    yield prefix, section
    for name, field in section.model_fields.items():
        inner = _inner_section(field)
        if inner is not None:
            yield from _find_sections(f"{prefix}.{name}".strip("."), inner)


def _inner_section(field: FieldInfo) -> type[BaseModel] | None:
    options = [field.annotation, *get_args(field.annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _write_section(name: str, section: type[BaseModel], shipped: dict[str, dict[str, Any]]) -> str:
    title = f"`{name}`" if name else "The run"
    lines = [
        "",
        f"## {title}",
        "",
        "| option | what it does | values | default | in configs/ |",
        "|---|---|---|---|---|",
    ]
    for option, field in section.model_fields.items():
        key = f"{name}.{option}".strip(".")
        values = describe_values(field.rebuild_annotation())
        default, is_section = _describe_default(option, field, section), _inner_section(field) is not None
        if is_section:
            values = values.replace("section", f"[section](#{key.replace('.', '')})")
        in_configs = "" if is_section else _describe_shipped(key, shipped)
        lines.append(f"| `{key}` | {field.description or ''} | {values} | {default} | {in_configs} |")
    return "\n".join(lines) + "\n"


def describe_values(annotation: Any) -> str:
    """Describe the values that an option of this type may have."""
    for kind, words in KINDS.items():
        if annotation == kind:
            return words
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        base, *checks = arguments
        return f"{describe_values(base)} {_describe_bounds(checks)}".strip()
    if origin in (Union, types.UnionType):
        return " or ".join([*(describe_values(a) for a in arguments if a is not type(None)), "null"])
    if origin is Literal:
        return ", ".join(_code(value) for value in arguments)
    if origin is tuple:
        first, *others = {describe_values(argument): None for argument in arguments}
        assert not others, "a tuple of one kind"
        return f"{len(arguments)} of: {first}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return PLAIN[annotation]


def _describe_bounds(checks: Iterable[Any]) -> str:
    """Describe the bounds of `annotated_types`, alone or in pydantic's Field."""
    words = []
    for check in checks:
        match check:
            case FieldInfo():
                words.append(_describe_bounds(check.metadata))
            case Ge():
                words.append(f"from {check.ge}")
            case Gt():
                words.append(f"above {check.gt}")
            case Le():
                words.append(f"to {check.le}")
            case Lt():
                words.append(f"below {check.lt}")
            case MultipleOf():
                words.append(f"a multiple of {check.multiple_of}")
    return ", ".join(words)


def _describe_default(option: str, field: FieldInfo, section: type[BaseModel]) -> str:
    if field.is_required():
        return "must be given"
    if field.default_factory is not None:  # it follows from the section's other options
        return _code(getattr(section(), option))
    return "its own" if isinstance(field.default, BaseModel) else _code(field.default)


def _describe_shipped(key: str, shipped: dict[str, dict[str, Any]]) -> str:
    """Describe the values in the files: the most common first, and the others with their files."""
    who: dict[str, list[str]] = {}
    for name, values in shipped.items():
        if key in values:
            who.setdefault(_code(values[key]), []).append(name.removeprefix("gc_vit_"))
    if len(who) > MAX_VALUES:  # such as the tag, which is another one in each file
        return "differs"
    first, *others = sorted(who, key=lambda value: -len(who[value])) or [""]
    is_common = not who or len(who[first]) > len(shipped) / 3
    named = (f"{value}: {', '.join(who[value])}" for value in (others if is_common else [first, *others]))
    return "; ".join([*([first] if is_common else []), *named])


def _code(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"`[{', '.join(_code(item).strip('`') for item in value)}]`"
    return f"`{value:.6g}`" if isinstance(value, float) else f"`{json.dumps(value)}`".replace('"', "")


def main() -> None:
    argparse.ArgumentParser(prog="python -m docs.config_page", description=__doc__).parse_args()
    PAGE.write_text(write_page())
    print(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
