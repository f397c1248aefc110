"""A stand-in for the package wandb: each call is a JSON row in the file that FAKE_WANDB_LOG names."""

import json
import os
from typing import Any


class Settings:
    def __init__(self, **options: Any):
        self.options = options


class Histogram:
    def __init__(self, values: Any):
        self.values = values


class Image:
    def __init__(self, pixels: Any, caption: str):
        self.pixels, self.caption = pixels, caption


class _Summary:
    def update(self, values: dict[str, float]) -> None:
        _tell("summary", **values)


class _Run:
    summary = _Summary()

    def define_metric(self, name: str, step_metric: str) -> None:
        _tell("define_metric", name=name, step_metric=step_metric)

    def log(self, values: dict[str, Any]) -> None:
        _tell("log", **values)

    def mark_preempting(self) -> None:
        _tell("mark_preempting")

    def finish(self, exit_code: int) -> None:
        _tell("finish", exit_code=exit_code)


def init(**options: Any) -> _Run:
    if os.environ.get("FAKE_WANDB_REFUSES"):
        raise RuntimeError("no such account")
    _tell("init", **options)
    return _Run()


def _tell(call: str, **what: Any) -> None:
    with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
        file.write(json.dumps({"call": call, **what}, default=vars_or_name) + "\n")


def vars_or_name(thing: Any) -> Any:
    return thing.options if isinstance(thing, Settings) else type(thing).__name__
