"""Print in one line how the processes of a job ended, and exit with what the job does next.

    python launch/job_outcome.py REPORT_DIR PROCESSES_PER_NODE CODE_OF_SRUN NODE...

0: all finished; 75: preempted, resume later; 2: an error of the user, no restart; 1: crashed, hung, killed, or
preempted before the first step, try again. Every process writes a report if it can, and the first failure is the
cause. A process that was killed, for using too much memory for example, writes none. The other reports then only state
that the connection was lost, and the report of torchrun (torchrun_agent.py) names the process.
"""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

FINISHED, FAILED, USER_ERROR, PREEMPTED = 0, 1, 2, 75
# Errors of a process that lost the connection to another one.
LOST = re.compile(r"connection|peer|gloo|nccl|DistBackendError|DistNetworkError|DistStoreError", re.IGNORECASE)


def read_reports(folder: Path, of: str = "rank") -> dict[int, dict[str, Any]]:
    """Read the reports by rank: those of the ranks, or those of the "agents" about the first rank that failed."""
    reports = {}
    for path in folder.glob(f"{of}_*.json"):
        try:
            report = json.loads(path.read_bytes())
            reports[int(report["rank"])] = report
        except (OSError, ValueError, KeyError):  # of a node that is failing
            continue
    return reports


def judge(
    reports: dict[int, dict[str, Any]],
    agents: dict[int, dict[str, Any]],
    num_processes: int,
    code: int,
    nodes: list[str],
) -> tuple[int, str]:
    """Return the exit code and the line.

    Args:
        num_processes: The number of processes of each node.
        code: The exit code of srun.
    """
    size = num_processes * len(nodes)
    silent = [rank for rank in range(size) if rank not in reports]
    by_time = sorted(reports.values(), key=when)
    of = {
        outcome: [report for report in by_time if report["outcome"] == outcome]
        for outcome in ("user error", "failed", "hung", "preempted", "finished")
    }
    if len(of["finished"]) == size:
        return FINISHED, f"finished: all {size} processes"
    without = f"; no report of {describe_ranks(silent, num_processes, nodes)}" if silent else ""
    if of["user error"]:
        return USER_ERROR, f"a restart cannot mend it: {describe(of['user error'][0])}{without}"
    if of["hung"]:
        # A stopped process does not notice that it hangs. The others wait for it, and report at about the same time.
        others = sorted({*range(size)} - {report["rank"] for report in of["hung"]})
        suspects = f"; the cause may be {describe_ranks(others, num_processes, nodes)}, without such a report"
        line = f"hung: {describe(of['hung'][0])} ({len(of['hung'])} of {size} processes say so)"
        return FAILED, line + (suspects if others else "")
    if of["failed"] and not (silent and LOST.search(of["failed"][0]["what"])):
        return FAILED, f"crashed: {describe(of['failed'][0])}{without}"
    if of["preempted"] and not of["failed"]:
        # A run that never reaches a step would be requeued forever.
        has_moved = any(report["step"] is not None for report in of["preempted"])
        return PREEMPTED if has_moved else FAILED, f"preempted: {describe(of['preempted'][0])}{without}"
    where = describe_ranks(silent, num_processes, nodes)
    killed = min((agents[rank] for rank in silent if agents.get(rank, {}).get("exit", 0) < 0), key=when, default=None)
    if killed:
        name = signal.Signals(-killed["exit"]).name
        cause = f"killed by {name}: rank {killed['rank']} on {nodes[killed['rank'] // num_processes]}"
        cause += "; out of memory (see the node's kernel log), or somebody else" if name == "SIGKILL" else ""
    elif len(silent) == size:
        cause = f"no process left a report, srun ended with {code}: {where} did not start, or all were killed"
    else:
        cause = f"killed without a word: {where}; out of memory (see the node's kernel log), or its node died"
    return FAILED, cause + (f"; the first word: {describe(of['failed'][0])}" if of["failed"] else "")


def when(report: dict[str, Any]) -> float:
    return float(report["time"])


def describe(report: dict[str, Any]) -> str:
    step = "" if report["step"] is None else f", after step {report['step']}"
    return f"rank {report['rank']} on {report['host']}{step}: {report['what']}"


def describe_ranks(ranks: list[int], num_processes: int, nodes: list[str]) -> str:
    words = [f"rank {rank} on {nodes[rank // num_processes]}" for rank in ranks[:8]]
    return ", ".join(words) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


if __name__ == "__main__":
    folder, num_processes, code, *nodes = sys.argv[1:]
    of_ranks, of_agents = (read_reports(Path(folder), of) for of in ("rank", "agent"))
    verdict, line = judge(of_ranks, of_agents, int(num_processes), int(code), nodes)
    print(line)
    sys.exit(verdict)
