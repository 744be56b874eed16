"""The trainer beside its peers: loss curves, speed, what serving feels of it, and a real run.

Run      python -m bench.train [--only parity speed serving vicuna] [--threads 1 2] [--rounds 2]
Writes   bench/results/train.json after every part; parts that are not run keep their figures
Parts    parity   loss curves of 60 steps beside peft + trl's (bench/train_parity.py)
         speed    optimizer steps beside peft + bitsandbytes' (bench/train_speed.py): a LLaMA of 12
                  layers, 768 wide, 4 sequences of 64 tokens, rank 8 on all linear layers; systems
                  take turns, the best step of each counts
         serving  streams beside training (bench/train_serving.py)
         vicuna   a reward adapter on the Vicuna benchmark's verdicts (bench/vicuna_reward.py)
Ratios   of processor time with one thread, of wall time with more. Each row says how many
         processors others used meanwhile; where that leaves fewer than its threads need, its wall
         time is of a busy machine and gives no ratio.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cpu_models import make_model
from bench.overhead import cpu_name, git_commit

ROOT = Path(__file__).parent.parent
RESULT = Path("bench/results/train.json")
PARTS = ("parity", "speed", "serving", "vicuna")
SYSTEMS = ("herd", "peft", "peft-checkpointing")
NUM_PARITY_STEPS = 60
SHAPE = "110M"
TOLERANCE_CPUS = 0.12
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
Row = dict[str, Any]


def main() -> None:
    options = parse_options()
    result: Row = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in PARTS:
        if part in options.only:
            result[part] = {**MEASURES[part](options), **circumstances()}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


def parse_options() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--dropouts", type=float, nargs="*", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=2, help="of speed")
    parser.add_argument("--models", type=Path, default=Path("models/cpubench"))
    parser.add_argument("--vicuna", type=Path, default=Path("../shared/data/vicuna"))
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def circumstances() -> Row:
    """Where, when and with what a part was measured."""
    return {
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def measure_parity(_: argparse.Namespace) -> Row:
    """Curves of every method in both dtypes."""
    from bench.train_parity import METHODS, TOLERANCE, measure_parity

    rows = []
    for dtype in TOLERANCE:
        for method in METHODS:
            row = measure_parity(dtype, method, NUM_PARITY_STEPS)
            rows.append(row)
            print(
                f"{method} {dtype}: largest difference {row['largest_difference']:.2e} of "
                f"{row['steps']} losses, {row['tolerance']} allowed",
                flush=True,
            )
    return {"all_hold": all(row["holds"] for row in rows), "rows": rows}


def measure_speed(options: argparse.Namespace) -> Row:
    """The best step of each system, and Herd's speed over the peers'."""
    folder = options.models / SHAPE
    make_model(SHAPE, folder)
    rows: list[Row] = []
    for _ in range(options.rounds):
        for threads in options.threads:
            for dtype in options.dtypes:
                for dropout in options.dropouts:
                    for system in SYSTEMS:
                        labels = {
                            "system": system, "dtype": dtype, "threads": threads,
                            "dropout": dropout,
                        }  # fmt: skip
                        merge(rows, {**labels, **run_system(folder, labels)})
    ratios = [ratio for row in rows if (ratio := ratio_of(row, rows))]
    for row in (*ratios, *rows):
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    return {"model": SHAPE, "ratios": ratios, "rows": rows}


def run_system(folder: Path, labels: Row) -> Row:
    """One system in a process of its own."""
    flags = [word for name, value in labels.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "bench.train_speed", str(folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    print(labels, row, flush=True)
    return row


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row[name] for name in ("system", "dtype", "threads", "dropout"))


def merge(rows: list[Row], new: Row) -> None:
    """Take a row; of an earlier round's, the smaller times count."""
    for row in rows:
        if key_of(row) == key_of(new):
            row["cpu_seconds"] = min(row["cpu_seconds"], new["cpu_seconds"])
            if new["seconds"] < row["seconds"]:
                for name in ("seconds", "tokens_per_s", "others_cpus"):
                    row[name] = new[name]
            return
    rows.append(new)


def ratio_of(row: Row, rows: list[Row]) -> Row | None:
    """Our row beside the peers': None for a peer's own, or where a machine was too busy."""
    if row["system"] != "herd":
        return None
    peers = {
        other["system"]: other
        for other in rows
        if other["system"] != "herd" and key_of(other)[1:] == key_of(row)[1:]
    }
    measure = "cpu_seconds" if row["threads"] == 1 else "seconds"
    spare = (os.cpu_count() or 1) - row["threads"] + TOLERANCE_CPUS
    is_busy = any(found["others_cpus"] > spare for found in (row, *peers.values()))
    if measure == "seconds" and is_busy:
        return None
    over = {f"over_{name}": round(peer[measure] / row[measure], 2) for name, peer in peers.items()}
    about = {name: row[name] for name in ("dtype", "threads", "dropout")}
    return {**about, "of": measure, **over}


def measure_serving(_: argparse.Namespace) -> Row:
    """bench/train_serving.py's figures."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "serving.json"
        return run_bench(["bench.train_serving", "--output", str(found)], found)


def measure_vicuna(options: argparse.Namespace) -> Row:
    """bench/vicuna_reward.py's figures, which it writes to a file of its own too."""
    found = ROOT / "bench" / "results" / "vicuna_reward.json"
    return run_bench(["bench.vicuna_reward", "--source", str(options.vicuna)], found)


def run_bench(command: list[str], found: Path) -> Row:
    """Run another benchmark; the content of the file that it writes."""
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    result: Row = json.loads(found.read_text())
    return result


MEASURES = {
    "parity": measure_parity,
    "speed": measure_speed,
    "serving": measure_serving,
    "vicuna": measure_vicuna,
}

if __name__ == "__main__":
    main()
