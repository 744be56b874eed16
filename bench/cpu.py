"""Herd on the CPU, side by side with llama.cpp and with transformers + bitsandbytes.

Run      python -m bench.cpu [--only PART ...] [--shapes 160M 1.1B] [--threads 1 2] [--rounds 2]
Writes   bench/results/cpu-<machine>.json after every part; parts that are not run keep their rows
Models   random weights, made once in --models (several GB): NF4 with double quantisation for Herd
         and transformers, GGUF of the same numbers for llama.cpp
Peers    llama.cpp through an interpreter that has llama-cpp-python and gguf, --llama-python:
             DIR/bin/pip install gguf llama-cpp-python --no-binary llama-cpp-python
         skipped with a message where it is not there
Method   each system in a process of its own, taking turns, --rounds times; the best counts. Before
         each, wait until others leave the processors alone, and repeat what was disturbed. Every
         row says how many processors others used meanwhile (others_cpus); where that leaves less
         than its threads need, the figure is of a busy machine and gives no ratio.
Ratios   printed and written first. Share of the limit: bytes of weights that a step reads, times
         steps per second, over the speed at which plain reads stream with as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.cpu_load import best, wait_until_quiet
from bench.cpu_models import NUM_ADAPTERS, make_adapter, make_model, make_tokenizer
from bench.overhead import cpu_name, git_commit, slug

ROOT = Path(__file__).parent.parent
INT8 = "herd-int8-activations"
SYSTEMS = ("herd", INT8, "herd-int8-head", "herd-nf4-head", "Q4_0", "IQ4_NL", "transformers")
LLAMA_TYPES = ("Q4_0", "IQ4_NL")
PARTS = ("limits", *SYSTEMS, "demo")
READ_BYTES = 1 << 30
LIMITS_PATIENCE_S = 20.0
TOLERANCE_CPUS = 0.12
MORE_IS_BETTER = ("tokens_per_s", "gb_per_s", "gflop_per_s")
Row = dict[str, Any]


def main() -> None:
    """Command line: run the parts, keep the file up to date, print ratios and rows."""
    options = parse_options()
    path = options.output or Path("bench/results") / f"cpu-{slug(cpu_name())}.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows: list[Row] = result["rows"]
    for shape in options.shapes:
        make_model(shape, options.models / shape)
        make_tokenizer(options.models / shape / "nf4")
        for seed in range(NUM_ADAPTERS):
            make_adapter(options.models / shape, seed)

    def keep(system: str, shape: str, threads: int, found: list[Row], *, is_first: bool) -> None:
        labels = {"system": system, "shape": shape, "threads": threads}
        for row in found:
            merge(rows, {**labels, **row, "commit": git_commit(), "date": now()}, is_first=is_first)
        result.update(describe(options))
        result["ratios"] = ratios(rows)
        add_shares(rows)
        ordered = {"ratios": result["ratios"], **result, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ordered, indent=1) + "\n")

    for round_number in range(options.rounds):
        is_first = round_number == 0
        if "limits" in options.only:
            for threads in options.threads:
                wait_until_quiet(options.max_others, options.wait)
                keep("machine", "-", threads, limits(threads), is_first=is_first)
        for shape in options.shapes:
            for threads in options.threads:
                for system in SYSTEMS:
                    if system in options.only:
                        found = run_system(system, shape, threads, options)
                        keep(system, shape, threads, found, is_first=is_first)
        if "demo" in options.only:
            found = run_child([sys.executable, "-m", "bench.cpu_http"], options)
            keep("herd", "demo", 0, found, is_first=is_first)
    print_tables(rows)
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="*", default=["160M", "1.1B"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("models/cpubench"))
    parser.add_argument("--llama-python", type=Path, default=Path("models/llama/bin/python"))
    parser.add_argument("--max-others", type=float, default=0.1, help="processors in others' use")
    parser.add_argument("--wait", type=float, default=600, help="seconds to wait for quiet at most")
    parser.add_argument("--output", type=Path)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="after --: flags of every part")
    options = parser.parse_args()
    options.rest = [word for word in options.rest if word != "--"]
    return options


def run_system(system: str, shape: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """One system on one shape, in a process of its own."""
    folder = str(options.models / shape)
    command = [sys.executable, "-m", "bench.cpu_herd", folder]
    if system in LLAMA_TYPES:
        if not options.llama_python.exists():
            print(f"{system}: skipped, {options.llama_python} is not there (see --help)")
            return []
        command = [str(options.llama_python), "-m", "bench.cpu_llama", folder, "--type", system]
    elif system == "transformers":
        command[2] = "bench.cpu_transformers"
    elif system == INT8:
        command += ["--cpu-activations", "int8"]
    elif system != "herd":
        command += ["--lm-head-dtype", system.split("-")[1], "--adapters", "0", "--prompts", "32"]
    return run_child([*command, "--threads", str(threads), *options.rest], options)


def run_child(command: list[str], options: argparse.Namespace) -> list[Row]:
    """Rows that a part prints as its last line; none, with a message, where it fails."""
    others = wait_until_quiet(options.max_others, options.wait)
    print(
        f"{time.strftime('%H:%M:%S')} others use {others:.2f}: {' '.join(command[1:])}", flush=True
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"failed: {done.stderr.strip()[-500:]}")
        return []
    rows: list[Row] = json.loads(done.stdout.strip().splitlines()[-1])
    return rows


def limits(threads: int) -> list[Row]:
    """GB/s of plain reads, and GFLOP/s of bfloat16 products of 512 tokens."""
    from kernels.native.library import load
    from kernels.threads import set_num_threads

    library: ctypes.CDLL = load("auto")
    set_num_threads(threads)
    memory = torch.ones(READ_BYTES // 4)

    def read() -> float:
        started = time.perf_counter()
        library.herd_read(memory.data_ptr(), READ_BYTES)
        return time.perf_counter() - started

    weight, x = torch.randn(2048, 2048).bfloat16(), torch.randn(512, 2048).bfloat16()

    def multiply() -> float:
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, weight)
        return time.perf_counter() - started

    reading, product = best(read, 10, LIMITS_PATIENCE_S), best(multiply, 5, LIMITS_PATIENCE_S)
    gb_per_s = READ_BYTES / reading.pop("seconds") / 1e9
    gflop_per_s = 20 * 512 * 2048 * 2048 / product.pop("seconds") / 1e9
    return [
        {"kind": "read", "gb_per_s": round(gb_per_s, 2), **reading},
        {"kind": "bfloat16 product", "gflop_per_s": round(gflop_per_s, 1), **product},
    ]


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    names = ("system", "shape", "threads", "kind", "size", "adapters")
    return tuple(row.get(name) for name in names)


def merge(rows: list[Row], new: Row, *, is_first: bool) -> None:
    """Take a row: instead of an earlier program run's, or the better of this run's rounds."""
    for index, old in enumerate(rows):
        if key_of(old) == key_of(new):
            measure = next((name for name in MORE_IS_BETTER if name in new), "")
            is_better = new[measure] > old[measure] if measure else is_faster_start(new, old)
            if is_first or is_better:
                rows[index] = new
            return
    rows.append(new)


def is_faster_start(new: Row, old: Row) -> bool:
    """Rows about start-up and memory: the quicker one."""
    name = "start_s" if "start_s" in new else "load_s"
    return bool(new[name] < old[name])


def find(rows: list[Row], *key: Any, field: str = "tokens_per_s") -> float | None:
    """A figure by system, shape, threads, kind, size, adapters."""
    padded = (*key, *(None,) * (6 - len(key)))
    return next((row.get(field) for row in rows if key_of(row) == padded), None)


def add_shares(rows: list[Row]) -> None:
    """Decode rows: the share of the speed at which memory could be read."""
    for row in rows:
        if row["kind"] != "decode":
            continue
        system, shape, threads = row["system"], row["shape"], row["threads"]
        speed = find(rows, "machine", "-", threads, "read", field="gb_per_s")
        source = "herd" if system == "transformers" else system
        read = find(rows, source, shape, threads, "memory", field="read_bytes")
        if speed and read:
            steps_per_s = row["tokens_per_s"] / row["size"]
            row["share_of_limit"] = round(read * steps_per_s / (speed * 1e9), 3)


def is_undisturbed(row: Row) -> bool:
    """Whether others left it the processors that its threads need, or nearly."""
    spare = (os.cpu_count() or 1) - row["threads"]
    return bool(row.get("others_cpus", 0.0) <= spare + TOLERANCE_CPUS)


def ratios(rows: list[Row]) -> list[Row]:
    """Herd over the best llama.cpp and over transformers, for whatever both have undisturbed."""
    found = []
    rows = [row for row in rows if is_undisturbed(row)]
    for row in rows:
        if row["system"] not in ("herd", INT8) or row["kind"] not in ("decode", "prefill"):
            continue
        system, shape, threads, kind, size, adapters = key_of(row)
        entry = {"system": system, "shape": shape, "threads": threads, "kind": kind, "size": size}
        entry |= {"adapters": adapters, "herd_tokens_per_s": row["tokens_per_s"]}
        about = (shape, threads, kind, size, adapters)
        llama = [find(rows, quant_type, *about) for quant_type in LLAMA_TYPES]
        others = {
            "over_llama": max((speed for speed in llama if speed), default=None),
            "over_transformers": find(rows, "transformers", *about),
        }
        if adapters == NUM_ADAPTERS:
            others["over_one_adapter"] = find(rows, system, shape, threads, kind, size, 1)
        entry |= {
            name: round(row["tokens_per_s"] / speed, 2) for name, speed in others.items() if speed
        }
        found.append(entry)
    return found


def describe(options: argparse.Namespace) -> Row:
    """Where, when and with what."""
    packages = ("torch", "transformers", "bitsandbytes", "peft")
    return {
        "command": "python -m bench.cpu " + " ".join(sys.argv[1:]),
        "date": now(),
        "machine": {
            "cpu": cpu_name(),
            "architecture": platform.machine(),
            "num_cpus": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rounds": options.rounds,
    }


def now() -> str:
    """The time, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def print_tables(rows: list[Row]) -> None:
    """Ratios, then rows."""
    for entry in ratios(rows):
        print("  ".join(f"{name} {value}" for name, value in entry.items()))
    for row in rows:
        hidden = ("commit", "date", "load_average")
        print("  ".join(f"{k} {v}" for k, v in row.items() if v is not None and k not in hidden))


if __name__ == "__main__":
    main()
