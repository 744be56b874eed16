"""Who else used the processors while something was measured. Standard library only: the peers'
interpreters import it too. Linux.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
QUIET_CPUS = 0.1
"""Processors that others may use while something is measured undisturbed."""


def busy_s() -> float:
    """Processor seconds that all processes together have used since the machine started."""
    with open("/proc/stat", encoding="ascii") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(
            int, stat.readline().split()[1:9]
        )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def wait_until_quiet(max_cpus: float, timeout_s: float) -> float:
    """Wait until others use at most so many processors over two seconds; returns what they use."""
    deadline = time.monotonic() + timeout_s
    while True:
        before, started = busy_s() - time.process_time(), time.perf_counter()
        time.sleep(2)
        used = busy_s() - time.process_time() - before
        others = max(0.0, used / (time.perf_counter() - started))
        if others <= max_cpus or time.monotonic() > deadline:
            return round(others, 2)


def best(run: Callable[[], float], num_repeats: int, patience_s: float) -> dict[str, Any]:
    """The fastest of several runs, with what others did meanwhile.

    Runs until num_repeats of them were quiet, or patience_s are over.

    Args:
        run: measures itself and returns seconds.

    Returns:
        seconds, others_cpus (processors that others used during that run) and the load average.
    """
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + patience_s
    num_quiet = 0
    while num_quiet < num_repeats and (len(rows) < num_repeats or time.monotonic() < deadline):
        busy, own, started = busy_s(), time.process_time(), time.perf_counter()
        seconds = run()
        wall = time.perf_counter() - started
        others = max(0.0, (busy_s() - busy - (time.process_time() - own)) / wall)
        num_quiet += others <= QUIET_CPUS
        rows.append(
            {
                "seconds": seconds,
                "others_cpus": round(others, 2),
                "load_average": round(os.getloadavg()[0], 2),
            }
        )
    return min(rows, key=lambda row: row["seconds"])


def speed_row(
    kind: str, size: int, num_adapters: int, num_tokens: int, row: dict[str, Any]
) -> dict[str, Any]:
    """One figure: best()'s row, its seconds turned into tokens per second."""
    speed = round(num_tokens / row.pop("seconds"), 2)
    return {"kind": kind, "size": size, "adapters": num_adapters, "tokens_per_s": speed, **row}


def memory_row(pid: int | str = "self") -> dict[str, int]:
    """Memory that a process holds now, in bytes.

    Returns:
        resident_bytes; of them anon_bytes, which are its own, and file_bytes, pages of programs and
        files that the system can drop and read again; and pss_bytes, in which a page that several
        processes share is divided among them.
    """
    fields = {"VmRSS": "resident_bytes", "RssAnon": "anon_bytes", "RssFile": "file_bytes"}
    fields["Pss"] = "pss_bytes"
    row = {}
    for name in ("status", "smaps_rollup"):
        with open(f"/proc/{pid}/{name}", encoding="ascii", errors="replace") as file:
            for line in file:
                field, _, value = line.partition(":")
                if field in fields:
                    row[fields[field]] = int(value.split()[0]) * 1024
    return row


def resident_bytes() -> int:
    """Memory that this process holds now, all kinds together."""
    return memory_row()["resident_bytes"]
