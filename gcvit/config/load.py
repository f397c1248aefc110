"""Read a config from YAML, the command line and flags, explain its errors, and write it.

`gcvit.config.schema` defines the options.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gcvit.config.schema import Config
from gcvit.errors import UserError

_PATTERNS = {
    "tag": "letters, digits and . _ -, of which a letter or digit comes first",
    "trainer.profile": "START:STEPS, two whole numbers, as 20:3",
}
"""Descriptions of the patterns of options."""
RENAMED = {
    "data.run_bytes": "data.chunk_bytes",
    "data.open_runs": "data.shuffle_chunks",
    "data.max_damaged_fraction": "data.max_corrupt_fraction",
    "trainer.max_bad_steps": "trainer.max_nonfinite_steps",
}
"""New names of renamed options, by their former names, which are refused."""


class _Loader(yaml.SafeLoader):
    """Read YAML as version 1.2 does: `5e-6` is a number, though it has no dot; `10:20` is a text, not 620."""


class _Dumper(yaml.SafeDumper):
    """Quote the texts that `_Loader` would read as numbers, such as a tag "1e5"."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )
    for _digit in "0123456789":
        by_sixties = ("tag:yaml.org,2002:str", re.compile(r"^\d+(:\d+)+$"))
        _class.yaml_implicit_resolvers[_digit].insert(0, by_sixties)


def parse_yaml(text: str) -> Any:
    """Parse safe YAML, in which `5e-6` is a number and `10:20` a text.

    Raises:
        yaml.YAMLError: The text is no YAML.
    """
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """Load the config file `path`, with `flags` and then `overrides` applied to it.

    Args:
        overrides: Texts `dotted.key=value`.
        flags: Plain values by dotted key; None is absent.

    Returns:
        The config, and notices for the user.

    Raises:
        UserError: The file is missing or malformed, a key is unknown (the hint has the nearest valid name), a value has
            a wrong type or is out of range, or an option has no effect.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text())
    except OSError as error:
        raise UserError("cannot read the config", got=f"{path} ({error.strerror})", hint="see configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("the config is no YAML", got=f"{path} ({error})", hint="see configs/ for examples") from None
    if not isinstance(tree, dict):
        raise UserError("the config must be a mapping of keys", got=f"{path} with a {type(tree).__name__}")
    file_batch = tree.get("global_batch_size")
    for key, value in (flags or {}).items():
        if value is not None:
            _set(tree, key, value)
    for override in overrides:
        _set(tree, *_read_override(override))
    typed = {key for key, value in (flags or {}).items() if value is not None}
    typed |= {override.partition("=")[0] for override in overrides}
    config = parse_config(tree, str(path), typed)
    if isinstance(file_batch, int) and file_batch > 0:
        is_asked = any(override.partition("=")[0] == "optim.lr_scaling" for override in overrides)
        return _guard_recipe(config, file_batch, is_asked)
    return config, []


def _guard_recipe(config: Config, file_batch: int, is_asked: bool) -> tuple[Config, list[str]]:
    """Scale the learning rate if the global batch is not the file's, and describe the other changes.

    Args:
        is_asked: Whether the command line gives optim.lr_scaling.

    Raises:
        UserError: The scaled rate is below optim.min_lr.
    """
    batch, optim = config.global_batch_size, config.optim
    if batch == file_batch:
        idle = is_asked and optim.lr_scaling != "none"
        told = f"optim.lr_scaling={optim.lr_scaling} changes nothing: the global batch is the recipe's {file_batch}"
        return config, [told] if idle else []
    factor = batch / file_batch
    lr = optim.lr * {"none": 1.0, "sqrt": factor**0.5, "linear": factor}[optim.lr_scaling]
    if lr < optim.min_lr:
        milder = "sqrt" if optim.lr_scaling == "linear" and optim.lr * factor**0.5 >= optim.min_lr else "none"
        raise UserError(
            "optim.lr_scaling leaves less than optim.min_lr",
            got=f"{lr:g} at global_batch_size={batch}",
            expected=f"{optim.min_lr:g} or more",
            hint=f"lower optim.min_lr, or take optim.lr_scaling={milder}",
        )
    becomes, decays = f"stays {lr:g}", "as before"
    if lr != optim.lr:
        becomes, decays = f"becomes {lr:g} instead of {optim.lr:g}", f"{lr / optim.lr:.3g} times as much"
    notice = (
        f"global batch {batch} instead of the recipe's {file_batch}: by optim.lr_scaling={optim.lr_scaling} the peak "
        f"learning rate {becomes}; an epoch has {1 / factor:.3g} times as many updates, and each decays the weights "
        f"{decays}; AdamW's moments reach over {factor:.3g} times as many samples; what the config gives in epochs "
        "keeps its length, what it gives in steps its number of updates"
    )
    return config.model_copy(update={"optim": optim.model_copy(update={"lr": lr})}), [notice]


def parse_config(tree: dict[str, Any], source: str, typed: Collection[str] = ()) -> Config:
    """Parse a tree of plain values, as read from YAML or JSON, to a config.

    Raises:
        UserError: The tree is no valid config. The error names `source`, or the command line for `typed` keys.
    """
    try:
        # Strict JSON mode: lists become tuples and 1 becomes 1.0, but "1" is no number and 1 is no bool.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _explain(error, source, typed) from None
    except (TypeError, ValueError) as error:  # json cannot write it: a date, say
        raise UserError("the config holds a value of an unknown kind", got=f"{source} ({error})") from None


def dump_config(config: Config) -> str:
    """Write the resolved config as YAML, which `load_config` reads back to an equal config."""
    return dump_yaml(json.loads(config.model_dump_json()))


def dump_yaml(tree: Any) -> str:
    """Write plain values as YAML that `parse_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not re.match(r"^[A-Za-z_][\w.]*$", key):
        raise UserError("cannot read an override", got=override, expected="dotted.key=value", hint="e.g. optim.lr=1e-3")
    try:
        return key, parse_yaml(text)
    except yaml.YAMLError:
        raise UserError("cannot read an override's value", got=override, expected="a YAML value") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        # The first option of an absent or null section creates it: `ema.half_life=...` switches EMA on.
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[last] = value


def _explain(error: ValidationError, source: str, typed: Collection[str]) -> UserError:
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"])
    if any(f"{key}.".startswith(f"{name}.") for name in typed):
        source = "the command line"
    where = f"{source}: {key}" if key else source
    more = f" ({len(others)} more after this one)" if others else ""
    got = f"{first['input']!r}{more}" if key else None
    if first["type"] == "extra_forbidden" and key in RENAMED:
        return UserError("this config key was renamed", got=where + more, expected=RENAMED[key], hint="rename it")
    if first["type"] == "extra_forbidden":
        names = _section_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, first['loc'][:-1]), near[0]])}?" if near else None
        return UserError("unknown config key", got=where + more, expected=", ".join(names), hint=hint)
    if first["type"] == "missing":
        return UserError(f"a config key is missing: {where}{more}", hint="add it, or see configs/ for examples")
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "string_pattern_mismatch":
        expected = _PATTERNS.get(key, expected)
    if not key:
        return UserError(f"{where}: {expected}{more}")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return UserError(f"{where}: {expected}{more}")  # a rule between options: the message names them
    return UserError(where, got=got, expected=expected)


def _section_keys(location: Sequence[str | int]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)
