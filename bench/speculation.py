"""What prompt lookup gains: tokens per second of the embedded demo with and without it.

    python -m bench.speculation [--rounds 5] [--tokens 200] [--output FILE]

One thread, in processor time, which other programs on the machine disturb less than the clock.
Through Engine.step(): a list that repeats itself, continued greedily, where most guesses are right,
and a text drawn at temperature 1, where few are. The best of the rounds counts, and both must say
the same.
"""

from __future__ import annotations

import bench.as_served  # noqa: F401  isort: skip

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from adapters.resolve import DEMO_BASE, resolve_base
from bench.cpu_load import best
from bench.overhead import cpu_name, git_commit, slug
from engine.api import GenerateRequest, SamplingParams
from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.startup import create_engine
from server.tokenizer import load_tokenizer

SPECULATIVE_CONFIG = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
PROMPT = "one, two, three, four. " * 12
TEMPERATURES = {"repetitive": 0.0, "drawn": 1.0}
BATCHES = (1, 4)
PATIENCE_S = 6.0


def main() -> None:
    options = parse_options()
    folder = resolve_base(DEMO_BASE, None)
    tokenizer = load_tokenizer(folder)
    engines = {
        name: make_engine(folder, config)
        for name, config in (("without", None), ("with", json.dumps(SPECULATIVE_CONFIG)))
    }
    prompt = tuple(tokenizer.encode(PROMPT, add_special_tokens=True))
    rows = []
    for text, num_seqs in ((text, num_seqs) for text in TEMPERATURES for num_seqs in BATCHES):
        rows.append(compare(engines, prompt, text, num_seqs, options.tokens, options.rounds))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    result = {
        "command": "python -m bench.speculation "
        f"--rounds {options.rounds} --tokens {options.tokens}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": {
            "cpu": cpu_name(),
            "num_cpus": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "speculative_config": SPECULATIVE_CONFIG,
        "rows": rows,
    }
    path = options.output or Path("bench/results") / f"speculation-{slug(cpu_name())}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, the best counts")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each sequence")
    parser.add_argument("--output", type=Path, help="result file")
    return parser.parse_args()


def make_engine(folder: Path, speculative_config: str | None) -> Engine:
    config = EngineConfig(
        model=ModelConfig(base=DEMO_BASE, device="cpu", threads=1),
        scheduler=SchedulerConfig(speculative_config=speculative_config),
    )

    def no_adapter(ref: object) -> Any:
        raise AssertionError(f"nobody asks for {ref}")

    return create_engine(config, folder, no_adapter, lambda *_: None)[0]


def compare(
    engines: dict[str, Engine],
    prompt: tuple[int, ...],
    text: str,
    num_seqs: int,
    num_tokens: int,
    num_rounds: int,
) -> dict[str, Any]:
    """One row: speeds of both, their ratio, and the share of guesses that were right."""
    answers: dict[str, list[tuple[int, ...]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, engine in engines.items():

        def run(name: str = name, engine: Engine = engine) -> float:
            temperature = TEMPERATURES[text]
            seconds, answers[name] = decode(engine, prompt, num_seqs, num_tokens, temperature)
            return seconds

        run()  # what is warmed up once: threads, the prefix cache
        before = counters(engine)
        found[name] = best(run, num_rounds, PATIENCE_S)
        guessed, right = (b - a for a, b in zip(before, counters(engine), strict=True))
    assert answers["with"] == answers["without"], "guessing has changed a text"
    speeds = {name: num_seqs * (num_tokens - 1) / row["seconds"] for name, row in found.items()}
    return {
        "text": text,
        "num_seqs": num_seqs,
        "tokens_per_cpu_s": {name: round(speed, 1) for name, speed in speeds.items()},
        "ratio": round(speeds["with"] / speeds["without"], 2),
        "acceptance": round(right / max(1, guessed), 2),
        "others_cpus": max(row["others_cpus"] for row in found.values()),
    }


def counters(engine: Engine) -> tuple[int, int]:
    """Tokens guessed, and those that were right."""
    speculation = engine.scheduler.speculation
    if speculation is None:
        return 0, 0
    return speculation.num_draft_tokens, speculation.num_accepted_tokens


def decode(
    engine: Engine, prompt: tuple[int, ...], num_seqs: int, num_tokens: int, temperature: float
) -> tuple[float, list[tuple[int, ...]]]:
    """Processor seconds from the first token of all sequences to the last, and what they say."""
    params = SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=0, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number in range(num_seqs):
        answers[str(number)] = []
        # The sequences differ in their first tokens, so that no two say the same.
        own = (*prompt[number:], *prompt[:number])
        engine.add(GenerateRequest(request_id=str(number), prompt_token_ids=own, params=params))
    started_s = time.process_time()
    while engine.has_work():
        for delta in engine.step().deltas:
            answers[delta.request_id] += delta.token_ids
        if min(map(len, answers.values())) <= 1:
            started_s = time.process_time()
    return time.process_time() - started_s, [tuple(tokens) for tokens in answers.values()]


if __name__ == "__main__":
    main()
