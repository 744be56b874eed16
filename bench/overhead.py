"""What a step costs besides the model: schedule, batch, sample, post-process and deltas.

    python -m bench.overhead [--steps 300] [--threads N] [--output FILE]

The model is null: fixed random logits over a vocabulary of 32,000. Its own time is measured and
taken off. Everything else is the engine as it serves. Aim: at most 1 ms per step with 1 sequence,
3 ms with 32. `cpu` is the same step in processor time, which other programs on the machine disturb
less; `message` is what pickling the step's answer adds in the worker.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy
import torch

from engine.api import GenerateRequest, SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.model_runner import ModelRunner
from engine.sampler import Sampler

VOCAB_SIZE = 32_000
BLOCK_SIZE = 16
NUM_BLOCKS = 8192
PROMPT_LEN = 200
NUM_WARM_UP_STEPS = 20
LIMITS_MS = {1: 1.0, 32: 3.0}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "sampled, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "sampled, top_k 50": {"temperature": 0.8, "top_k": 50},
    "sampled, all penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
    },
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}
MUST_MEET = ("greedy", "sampled")


class NullModel:
    """Fixed random logits, like a model's: a few likely tokens, a long tail."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = 2.5 * torch.randn(32, VOCAB_SIZE, generator=generator)
        self._hidden = torch.zeros(4096, 1)
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self, batch: Any, kv_caches: Any, lora: Any) -> torch.Tensor:
        del kv_caches, lora
        return self._hidden[: len(batch.input_ids)]

    def logits(self, hidden: torch.Tensor, lora: Any) -> torch.Tensor:
        del lora
        started, cpu_started = time.perf_counter(), time.process_time()
        logits = self._rows[: len(hidden)].clone()  # the sampler may change them
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started
        return logits


class NoAdapters:
    """A LoRA pool that nobody uses."""

    resident = ()
    num_loads = num_evictions = 0
    load_s = 0.0
    is_loading = False

    def poll(self) -> None:
        pass

    def batch(self, rows: list[int], scales: list[float]) -> None:
        del rows, scales


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    rows = [measure(num_seqs, name, options.steps) for num_seqs in LIMITS_MS for name in SAMPLING]
    result = {
        "command": f"python -m bench.overhead --steps {options.steps} --threads {options.threads}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": {
            "cpu": cpu_name(),
            "num_cpus": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
            "niceness": os.nice(0),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "vocab_size": VOCAB_SIZE,
        "prompt_len": PROMPT_LEN,
        "limits_ms": {str(num_seqs): limit for num_seqs, limit in LIMITS_MS.items()},
        "rows": rows,
    }
    print(
        f"{'sequences':>9}  {'sampling':<24} {'median ms':>9} {'p95 ms':>9} "
        f"{'cpu ms':>9} {'message':>9}  limit"
    )
    for row in rows:
        limit = f"{LIMITS_MS[row['num_seqs']]:.0f} ms" if row["sampling"] in MUST_MEET else "-"
        print(
            f"{row['num_seqs']:>9}  {row['sampling']:<24} "
            f"{row['median_ms']:>9.3f} {row['p95_ms']:>9.3f} "
            f"{row['cpu_median_ms']:>9.3f} {row['message_median_ms']:>9.3f}  {limit}"
        )
    path = options.output or Path("bench/results") / f"overhead-{slug(cpu_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="decode steps per row")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", type=Path, help="result file")
    return parser.parse_args()


def measure(num_seqs: int, sampling: str, num_steps: int) -> dict[str, Any]:
    """Milliseconds per decode step, the null model's own time taken off."""
    model = NullModel()
    engine = make_engine(model)
    for index in range(num_seqs):
        params = SamplingParams(
            max_tokens=num_steps + NUM_WARM_UP_STEPS + 10,
            ignore_eos=True,
            seed=index,
            **SAMPLING[sampling],
        )
        prompt = tuple((7 * index + position) % VOCAB_SIZE for position in range(PROMPT_LEN))
        engine.add(GenerateRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    while len(engine.scheduler.running) < num_seqs:
        engine.step()
    for _ in range(NUM_WARM_UP_STEPS):
        engine.step()
    times_ms, cpu_ms, message_ms = [], [], []
    for _ in range(num_steps):
        model.seconds = model.cpu_seconds = 0.0
        started, cpu_started = time.perf_counter(), time.process_time()
        output = engine.step()
        elapsed, cpu_elapsed = time.perf_counter() - started, time.process_time() - cpu_started
        assert len(output.deltas) == num_seqs
        times_ms.append(1e3 * (elapsed - model.seconds))
        cpu_ms.append(1e3 * (cpu_elapsed - model.cpu_seconds))
        started = time.perf_counter()
        ForkingPickler.dumps(output)
        message_ms.append(1e3 * (time.perf_counter() - started))
    return {
        "num_seqs": num_seqs,
        "sampling": sampling,
        "num_steps": num_steps,
        "median_ms": round(statistics.median(times_ms), 4),
        "p95_ms": round(statistics.quantiles(times_ms, n=20)[-1], 4),
        "cpu_median_ms": round(statistics.median(cpu_ms), 4),
        "message_median_ms": round(statistics.median(message_ms), 4),
    }


def make_engine(model: NullModel) -> Engine:
    config = EngineConfig(
        cache=CacheConfig(block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=4096),
    )
    pool: Any = NoAdapters()
    runner = ModelRunner(model, [], pool, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    return Engine(
        config,
        runner,
        Sampler(),
        compiler=None,  # type: ignore[arg-type]  # no request asks for a grammar
        lora_pool=pool,
        num_blocks=NUM_BLOCKS,
        max_model_len=4096,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[2],
    )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """ "Intel(R) Xeon(R) CPU" -> "intel-xeon-cpu"."""
    words = re.sub(r"\(\w+\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def git_commit() -> str:
    """The commit of the working tree; unknown where it is a mere copy, or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
