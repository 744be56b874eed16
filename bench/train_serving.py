"""What training costs the streams that run beside it, and what they cost training.

    python -m bench.train_serving [--models demo 110M] [--train-max-stall-ms 50] [--output FILE]

One worker process per model, as serve.py starts it. In each round, one after another: training
alone; streams alone; the same streams beside training; requests that come once a second beside
training. Streams are timed where their tokens arrive, training by its own count of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapters.format import read_ref
from adapters.writer import write_trained
from bench.cpu_load import busy_s
from bench.cpu_models import make_model
from engine.api import (
    GenerateRequest,
    SamplingParams,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingProgress,
)
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.model_config import ModelSpec
from engine.train.config import TrainConfig
from engine.train.token_dataset import make_dataset, save_dataset
from server.engine_client import EngineClient

DEMO = Path(__file__).resolve().parents[1] / "demo" / "model"
SAMPLE_TOKENS = 64
NUM_SAMPLES = 512
BATCH_SIZE = 4
PROMPT_TOKENS = 32
NUM_STREAMS = 2
LIGHT_TOKENS = 32
"""That a request of the light load asks for."""
FIRST_STEPS = 3
"""Of training, that are not counted: kernels and the allocator warm up."""


@dataclass(slots=True)
class Phase:
    """What one phase of one round has shown."""

    gaps_s: list[float] = field(default_factory=list)
    """Between two tokens of one stream."""
    tokens_per_s: float | None = None
    """Of training."""
    others_cpus: float = 0.0
    """Processors that other programs used meanwhile."""


class Bench:
    """A worker, its job, and the streams."""

    def __init__(self, folder: Path, work: Path, max_stall_ms: float, **model: Any) -> None:
        self.spec = ModelSpec.from_folder(folder)
        self.work = work
        self.client = EngineClient(
            EngineConfig(
                model=ModelConfig(base=str(folder), **model),
                cache=CacheConfig(kv_cache_memory_bytes=2**28),
                scheduler=SchedulerConfig(train_max_stall_ms=max_stall_ms),
            ),
            folder,
            functools.partial(read_ref, spec=self.spec),
            functools.partial(write_trained, base_model="bench"),
        )
        self.client.on_training_event = self._note
        self._counts: list[tuple[float, int]] = []  # (when, trained tokens)
        self._ended = asyncio.Event()
        self._num_jobs = self._num_requests = 0
        self._write_data()

    def _write_data(self) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            10, self.spec.vocab_size, (NUM_SAMPLES, SAMPLE_TOKENS), generator=generator
        )
        weights = [1.0] * SAMPLE_TOKENS
        sequences = ((row, weights) for row in ids.tolist())
        save_dataset(self.work / "data", make_dataset("supervised", sequences))

    def _note(self, event: TrainingEvent) -> None:
        if isinstance(event, TrainingProgress):
            self._counts.append((time.perf_counter(), event.trained_tokens))
        elif isinstance(event, TrainingEnded):
            assert event.status == "cancelled", event
            self._ended.set()

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        """A job that has warmed up and runs until the end."""
        self._num_jobs += 1
        job_id = f"job-{self._num_jobs}"
        self._counts, self._ended = [], asyncio.Event()
        config = TrainConfig(
            rank=8, batch_size=BATCH_SIZE, max_steps=10**6, save_every_steps=10**6, dropout=0.05
        )
        self.client.start_training(
            TrainingJob(
                job_id=job_id,
                folder=str(self.work / job_id),
                data_path=str(self.work / "data"),
                config=config,
            )
        )
        while len(self._counts) < FIRST_STEPS:
            await asyncio.sleep(0.01)
        self._counts = self._counts[-1:]
        yield
        self.client.stop_training(job_id, "cancelled")
        await self._ended.wait()

    async def stream(self, num_tokens: int, gaps_s: list[float]) -> None:
        """One request; the times between its tokens are added to gaps_s."""
        self._num_requests += 1
        generator = torch.Generator().manual_seed(self._num_requests)
        prompt = torch.randint(10, self.spec.vocab_size, (PROMPT_TOKENS,), generator=generator)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        last_s: float | None = None
        async for delta in self.client.generate(
            GenerateRequest(
                request_id=f"r{self._num_requests}",
                prompt_token_ids=tuple(prompt.tolist()),
                params=params,
            )
        ):
            assert delta.finish_reason != "error", delta
            now_s = time.perf_counter()
            if last_s is not None:
                gaps_s.append(now_s - last_s)
            last_s = now_s

    async def streams(self, seconds: float, gaps_s: list[float]) -> None:
        """So many streams at once, one after another in each place."""
        end_s = time.perf_counter() + seconds

        async def place() -> None:
            while time.perf_counter() < end_s:
                await self.stream(100, gaps_s)

        await asyncio.gather(*(place() for _ in range(NUM_STREAMS)))

    async def light_load(self, seconds: float, gaps_s: list[float]) -> None:
        """A request every second, whatever has become of the last one."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(round(seconds)):
                tasks.create_task(self.stream(LIGHT_TOKENS, gaps_s))
                await asyncio.sleep(1.0)

    async def phase(self, load: Coroutine[Any, Any, None], gaps_s: list[float]) -> Phase:
        """Run a load, and see what else happened."""
        own_s = _own_s(self.client)
        before_s, started_s = busy_s() - own_s, time.perf_counter()
        self._counts = self._counts[-1:]
        await load
        wall_s = time.perf_counter() - started_s
        others = max(0.0, (busy_s() - _own_s(self.client) - before_s) / wall_s)
        phase = Phase(gaps_s, others_cpus=others)
        if len(self._counts) > 1:
            (first_s, first), (last_s, last) = self._counts[0], self._counts[-1]
            phase.tokens_per_s = (last - first) / (last_s - first_s)
        return phase


def _own_s(client: EngineClient) -> float:
    """Processor seconds of this process and its worker."""
    assert client._worker is not None
    stat = Path(f"/proc/{client._worker.process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(stat[11]) + int(stat[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


async def measure(
    folder: Path, *, max_stall_ms: float, seconds: float, num_rounds: int, **model: Any
) -> dict[str, Any]:
    """All rounds on one model; `model` are fields of ModelConfig."""
    phases: dict[str, list[Phase]] = {}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(folder, Path(work), max_stall_ms, **model)
        info = await bench.client.start()
        try:
            for number in range(num_rounds + 1):  # the first warms up
                found = await _round(bench, seconds if number else 3.0)
                if number:
                    for name, phase in found.items():
                        phases.setdefault(name, []).append(phase)
                        _print(name, phase)
        finally:
            await bench.client.stop(0.0)
    return {"device": info.device, "dtype": info.dtype, **_summary(phases, max_stall_ms)}


async def _round(bench: Bench, seconds: float) -> dict[str, Phase]:
    found = {}
    async with bench.training():
        found["training alone"] = await bench.phase(asyncio.sleep(seconds), [])
    gaps: list[float] = []
    found["streams alone"] = await bench.phase(bench.streams(seconds, gaps), gaps)
    async with bench.training():
        gaps = []
        found["streams beside training"] = await bench.phase(bench.streams(seconds, gaps), gaps)
        gaps = []
        found["1 request/s beside training"] = await bench.phase(
            bench.light_load(seconds, gaps), gaps
        )
    return found


def _print(name: str, phase: Phase) -> None:
    gaps = f"p50 {_ms(phase.gaps_s, 50)} p99 {_ms(phase.gaps_s, 99)} ms" if phase.gaps_s else ""
    speed = f"{phase.tokens_per_s:.0f} tokens/s" if phase.tokens_per_s else ""
    print(f"  {name}: {gaps} {speed} (others: {phase.others_cpus:.2f} CPUs)", flush=True)


def _summary(phases: dict[str, list[Phase]], max_stall_ms: float) -> dict[str, Any]:
    """The figures that count: medians over the rounds, gaps over all of them."""
    rows = {}
    for name, found in phases.items():
        gaps_s = [gap for phase in found for gap in phase.gaps_s]
        speeds = [phase.tokens_per_s for phase in found if phase.tokens_per_s is not None]
        rows[name] = {
            "others_cpus": [round(phase.others_cpus, 2) for phase in found],
            **({"tokens_per_s": round(statistics.median(speeds), 1)} if speeds else {}),
            **(
                {
                    "num_gaps": len(gaps_s),
                    "p50_ms": _ms(gaps_s, 50),
                    "p95_ms": _ms(gaps_s, 95),
                    "p99_ms": _ms(gaps_s, 99),
                    "max_ms": _ms(gaps_s, 100),
                }
                if gaps_s
                else {}
            ),
        }
    alone, beside = rows["streams alone"], rows["streams beside training"]
    idle = rows["training alone"]["tokens_per_s"]
    light = rows["1 request/s beside training"]["tokens_per_s"]
    return {
        "train_max_stall_ms": max_stall_ms,
        "p99_rise_ms": round(beside["p99_ms"] - alone["p99_ms"], 1),
        "allowed_rise_ms": round(1.2 * max_stall_ms, 1),
        "training_share_beside_light_load": round(light / idle, 3),
        "phases": rows,
    }


def _ms(values_s: list[float], percent: int) -> float:
    ordered = sorted(values_s)
    index = min(len(ordered) - 1, int(len(ordered) * percent / 100))
    return round(ordered[index] * 1e3, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.train_serving")
    parser.add_argument("--models", nargs="+", default=["demo", "110M"], help="demo, or a shape")
    parser.add_argument("--train-max-stall-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="as of serve.py")
    parser.add_argument("--folder", default="/tmp/herd-bench", help="where random models are made")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as serve.py
    results = {}
    for name in args.models:
        folder = DEMO
        if name != "demo":
            made = Path(args.folder) / name
            make_model(name, made)
            folder = made / "nf4"
        print(name, flush=True)
        results[name] = asyncio.run(
            measure(
                folder,
                max_stall_ms=args.train_max_stall_ms,
                seconds=args.seconds,
                num_rounds=args.rounds,
                device=args.device,
                threads=args.threads,
            )
        )
        print(json.dumps(results[name], indent=1), flush=True)
    if args.output:
        content = {
            "command": f"python -m bench.train_serving {' '.join(sys.argv[1:])}",
            "cpus": os.cpu_count(),
            "threads": args.threads,
            "torch": torch.__version__,
            "models": results,
        }
        Path(args.output).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
