"""The settings of runs and where they ran: config, hardware and versions, and their differences."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from gcvit.report.charts import Cell, Table
from gcvit.report.formatting import count, moment, short
from gcvit.report.run_data import Record, Row, number, section

_NAMES = ("tag", "output_dir")  # differ between any two runs


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a tree to text by dotted key; lists and empty sections are leaves."""
    if isinstance(tree, dict) and tree:
        leaves: dict[str, str] = {}
        for key, value in tree.items():
            leaves |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return leaves
    return {prefix: tree if isinstance(tree, str) else json.dumps(tree, default=str)}


def tabulate_differences(records: Sequence[Record]) -> Table:
    """Tabulate the options that differ between the runs."""
    leaves = [flatten(record.config) for record in records]
    keys = dict.fromkeys(key for of_run in leaves for key in of_run)
    differing = [key for key in keys if len({of_run.get(key) for of_run in leaves}) > 1 and key not in _NAMES]
    rows = [[Cell(key), *(Cell(of_run.get(key, "–")) for of_run in leaves)] for key in differing]
    return Table(["option", *(record.name for record in records)], rows)


def describe_hardware(records: Sequence[Record]) -> tuple[list[tuple[str, str]], Table | None]:
    """Describe the last start of each run: values equal in all runs, and a table of the others."""
    started = [record for record in records if record.of_kind("start")]
    described = [_describe_start(record.start) for record in started]
    names = dict.fromkeys(name for of_run in described for name in of_run)
    values = {name: [of_run.get(name, "–") for of_run in described] for name in names}
    shared = [(name, of_name[0]) for name, of_name in values.items() if len(set(of_name)) == 1]
    rows = [[Cell(name), *map(Cell, of_name)] for name, of_name in values.items() if len(set(of_name)) > 1]
    return shared, Table(["", *(record.name for record in started)], rows) if rows else None


def list_changes(record: Record) -> list[str]:
    """List sentences on what changed at later starts of the run."""
    sentences = []
    starts = record.of_kind("start")
    for before, after in itertools.pairwise(starts):
        was, became = _describe_start(before), _describe_start(after)
        differing = [name for name in became if became[name] != was.get(name) and name != "started"]
        changes = [f"{name} {was.get(name, '–')} → {became[name]}" for name in differing]
        if changes:
            sentences.append(f"Restart at step {count(number(after.get('step')))}: {'; '.join(changes)}.")
    return sentences


def _describe_start(start: Row) -> dict[str, str]:
    if not start:
        return {}
    hosts = start.get("hosts")
    hosts = hosts if isinstance(hosts, list) else []
    peak = number(start.get("peak_flops"))
    flops = number(start.get("train_flops_per_image"))
    described = {
        "started": moment(number(start.get("time"))),
        "devices": f"{count(number(start.get('num_devices')))} × {start.get('device')}",
        "processes": count(number(start.get("world_size"))),
        "nodes": f"{len(hosts)}: {', '.join(map(str, hosts[:8]))}{' …' if len(hosts) > 8 else ''}" if hosts else "–",
        "engine": str(start.get("engine", "–")),
        "precision": str(start.get("precision", "–")),
        "global batch": count(number(start.get("global_batch_size"))),
        "micro-batch": count(number(start.get("micro_batch_size"))),
        "accumulation": count(number(start.get("accumulation"))),
        "parameters": count(number(start.get("parameters"))),
        "training FLOPs an image": f"{short(flops)}FLOP" if flops else "–",
        "peak of a device": f"{short(peak)}FLOP/s" if peak else "not known",
        "commit": str(start.get("commit") or "not known"),
    }
    return described | {str(name): str(version) for name, version in section(start, "versions").items()}
