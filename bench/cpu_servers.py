"""Herd's server beside llama.cpp's own, `llama-server`, on the same random numbers: total tokens/s.

Run      python -m bench.cpu_servers --llama-server PATH --llama-python PYTHON
             [--shapes 160M 1.1B] [--requests 1 2 4 8 16] [--rounds 3]
Writes   bench/results/cpu_servers-<machine>.json, ratios first
Peers    llama-server as llama.cpp's sources build it (cmake --build ... --target llama-server); the
         interpreter has llama-cpp-python and gguf of that version and writes the models
Method   so many requests at once, each 64 greedy tokens after 32 random ones of its own, prompts as
         token ids; all their tokens over the time from the first question to the last answer. The
         servers are started in turn, --rounds times each; the best of all repeats counts. Every row
         says how many processors the client took, which is one and the same for all servers, and
         how many others did. Herd also runs with eight requests on one adapter and on eight, which
         llama-server cannot batch, and with --cpu-activations int8, which is how llama.cpp always
         multiplies.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.cpu_http import ROOT, ask_together, children, processor_s
from bench.cpu_load import busy_s, wait_until_quiet
from bench.cpu_models import NUM_ADAPTERS, VOCAB_SIZE, make_adapter, make_model, make_tokenizer
from bench.overhead import cpu_name, git_commit, slug

HERDS = {"herd": (), "herd int8 activations": ("--cpu-activations", "int8")}
PROMPT_LEN, NUM_TOKENS = 32, 64
MAX_PARALLEL = 16
START_TIMEOUT_S = 120
PATIENCE_S = 300
REPEATS = 3
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Api:
    """How a server is asked for NUM_TOKENS greedy tokens."""

    path: str
    body: Callable[[str, list[int]], dict[str, Any]]
    """(model, prompt) -> what is sent."""
    num_tokens: Callable[[dict[str, Any]], int]
    """Of an answer: how many tokens it has."""


HERD = Api(
    path="/v1/completions",
    body=lambda model, prompt: {
        "model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0,
        "ignore_eos": True,
    },
    num_tokens=lambda answer: answer["usage"]["completion_tokens"],
)  # fmt: skip
LLAMA = Api(
    path="/completion",
    body=lambda _model, prompt: {
        "prompt": prompt, "n_predict": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False,
    },
    num_tokens=lambda answer: answer["tokens_predicted"],
)  # fmt: skip


@contextmanager
def running(command: list[str]) -> Iterator[tuple[int, list[int]]]:
    """Start a server; (its port on this machine, its processes)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not start")
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
        yield port, children(server.pid)
    finally:
        server.terminate()
        server.wait(30)


def measure(api: Api, port: int, pids: list[int], models: list[str]) -> Row:
    """One request per entry of models at once; the best of REPEATS."""
    rows: list[Row] = []
    for seed in range(REPEATS + 1):  # the first warms up
        chosen = random.Random(seed * 1000 + len(models))
        prompts = [[chosen.randrange(300, VOCAB_SIZE) for _ in range(PROMPT_LEN)] for _ in models]
        bodies = [
            json.dumps(api.body(*pair)).encode() for pair in zip(models, prompts, strict=True)
        ]
        busy, own, client = busy_s(), processor_s(pids), time.process_time()
        started = time.perf_counter()
        seconds, answers = ask_together(port, api.path, bodies)
        wall = time.perf_counter() - started
        own, client = processor_s(pids) - own, time.process_time() - client
        others = max(0.0, (busy_s() - busy - own - client) / wall)
        assert all(api.num_tokens(json.loads(answer)) == NUM_TOKENS for answer in answers)
        rows.append(
            {
                "tokens_per_s": round(len(models) * NUM_TOKENS / seconds, 1),
                "client_cpus": round(client / wall, 3),
                "others_cpus": round(others, 2),
            }
        )
    return max(rows[1:], key=lambda row: row["tokens_per_s"])


def measure_herd(
    folder: Path, threads: int, requests: list[int], flags: tuple[str, ...]
) -> Iterator[Row]:
    """Rows of Herd on one shape."""
    command = [sys.executable, "serve.py", "--no-ui", "--log-level", "error", "--base"]
    command += [str(folder / "nf4"), "--threads", str(threads), "--max-model-len", "1024", *flags]
    command += ["--max-num-seqs", str(MAX_PARALLEL), "--served-model-name", "base"]
    for seed in range(NUM_ADAPTERS):
        command += ["--adapter", f"a{seed}={make_adapter(folder, seed)}"]
    with running(command) as (port, pids):
        for count in requests:
            row = measure(HERD, port, pids, ["base"] * count)
            yield {"requests": count, "adapters": 0, **row}
        for adapters in (1, NUM_ADAPTERS):
            models = [f"a{i % adapters}" for i in range(8)]
            yield {"requests": 8, "adapters": adapters} | measure(HERD, port, pids, models)


def measure_llama(binary: Path, model: Path, threads: int, requests: list[int]) -> Iterator[Row]:
    """Rows of llama-server on one shape."""
    command = [str(binary), "--model", str(model), "--threads", str(threads)]
    command += ["--threads-batch", str(threads), "--parallel", str(MAX_PARALLEL)]
    command += ["--ctx-size", str(MAX_PARALLEL * 256)]
    with running(command) as (port, pids):
        for count in requests:
            yield {"requests": count, "adapters": 0} | measure(LLAMA, port, pids, [""] * count)


def ratios(rows: list[Row]) -> list[Row]:
    """Herd over llama-server's best, and eight adapters over one."""
    speeds: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in rows:
        key = (row["shape"], row["threads"], row["requests"], row["adapters"])
        speeds.setdefault(key, {})[row["system"]] = row["tokens_per_s"]
    found = []
    for (shape, threads, count, adapters), by_system in sorted(speeds.items()):
        labels = {"shape": shape, "threads": threads, "requests": count}
        peers = [speed for system, speed in by_system.items() if system not in HERDS]
        for system in HERDS.keys() & by_system.keys():
            herd, entry = by_system[system], {"system": system, **labels}
            if peers:
                found.append({**entry, "over_llama_server": round(herd / max(peers), 2)})
            one = speeds.get((shape, threads, count, 1))
            if adapters > 1 and one is not None:
                found.append({**entry, "eight_adapters_over_one": round(herd / one[system], 2)})
    return found


def main() -> None:
    """Command line: run everything, write the file, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--types", nargs="*", default=["Q4_0", "IQ4_NL"])
    parser.add_argument("--shapes", nargs="*", default=["160M", "1.1B"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("models/cpubench"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []

    def keep(system: str, shape: str, found: Iterator[Row]) -> None:
        labels = {"system": system, "shape": shape, "threads": options.threads}
        for row in found:
            print({**labels, **row}, flush=True)
            key = {**labels, "requests": row["requests"], "adapters": row["adapters"]}
            old = next((r for r in rows if key.items() <= r.items()), None)
            if old is None:
                rows.append({**labels, **row})
            elif row["tokens_per_s"] > old["tokens_per_s"]:
                old.update(row)

    for shape in options.shapes:
        folder = options.models / shape
        make_model(shape, folder)
        make_tokenizer(folder / "nf4")
        for _ in range(options.rounds):
            wait_until_quiet(0.1, PATIENCE_S)
            for system, flags in HERDS.items():
                measured = measure_herd(folder, options.threads, options.requests, flags)
                keep(system, shape, measured)
            for quant_type in options.types if options.llama_server else ():
                make = (
                    "import sys; from pathlib import Path; from bench.cpu_llama import make_gguf; "
                )
                make += "make_gguf(Path(sys.argv[1]), sys.argv[2])"
                command = [str(options.llama_python), "-c", make, str(folder), quant_type]
                subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
                model = folder / f"{quant_type}.gguf"
                wait_until_quiet(0.1, PATIENCE_S)
                keep(
                    f"llama-server {quant_type}",
                    shape,
                    measure_llama(options.llama_server, model, options.threads, options.requests),
                )
    result = {
        "ratios": ratios(rows),
        "command": "python -m bench.cpu_servers",
        "cpu": cpu_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "rows": rows,
    }
    path = options.output or ROOT / "bench" / "results" / f"cpu_servers-{slug(cpu_name())}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["ratios"]:
        print(row)


if __name__ == "__main__":
    main()
