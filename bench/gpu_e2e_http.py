"""Requests that arrive at random at a server of random weights: time to the first token, and
between tokens. Part of bench/gpu_e2e.py.

    python -m bench.gpu_e2e_http FOLDER [flags of serve.py]     the server alone

The server is serve.py's own; its worker makes the weights up on the device. Arrivals are a Poisson
process with a fixed seed; latencies are those of the client, over a connection of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.random_model import VOCAB_SIZE, use_random_weights

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 900
PROMPT_LEN = 256
OUTPUT_LEN = 128
MODEL = "random"


def run_random_worker(*args: Any) -> None:
    """engine.worker.run_worker over random weights; in the worker's process."""
    from engine.worker import run_worker

    use_random_weights()
    run_worker(*args)


def serve_random(words: list[str]) -> int:
    """serve.py, its worker replaced."""
    import serve
    import server.worker_process

    folder, *flags = words
    server.worker_process.run_worker = run_random_worker
    return serve.main(["--base", folder, "--served-model-name", MODEL, "--no-ui", *flags])


def measure_http(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each rate; one row that says so where the server's libraries are not there."""
    try:
        import fastapi  # noqa: F401
        import httpx
    except ImportError as error:
        yield {"what": "http", "skipped": str(error)}
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--port", str(port), "--device", options.device, "--max-model-len", "1024"]
    command = [sys.executable, "-m", "bench.gpu_e2e_http", str(folder), *flags]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(httpx, url, server)
        prompt_len = min(PROMPT_LEN, 4 * options.context)
        output_len = min(OUTPUT_LEN, 2 * options.steps)
        asyncio.run(_load(httpx, url, 4.0, 1.0, prompt_len, output_len))  # warms up
        for rate in options.rates:
            answers = asyncio.run(_load(httpx, url, rate, options.seconds, prompt_len, output_len))
            yield {"what": "http", "rate": rate, **_summary(answers)}
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait_until_ready(httpx: Any, url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise SystemExit("the server did not start; see its message above")


async def _load(
    httpx: Any, url: str, rate: float, seconds: float, prompt_len: int, output_len: int
) -> list[list[float]]:
    """Of each request, when it was sent and when each of its tokens came."""
    dice = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    tasks = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started_s = time.perf_counter()
        at_s = dice.expovariate(rate)
        while at_s < seconds or not tasks:
            await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
            prompt = [dice.randrange(3, VOCAB_SIZE) for _ in range(prompt_len)]
            tasks.append(asyncio.create_task(_ask(client, prompt, output_len)))
            at_s += dice.expovariate(rate)
        return await asyncio.gather(*tasks)


async def _ask(client: Any, prompt: list[int], output_len: int) -> list[float]:
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": output_len, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                times.append(time.perf_counter())
    return times


def _summary(answers: list[list[float]]) -> dict[str, Any]:
    firsts = sorted(times[1] - times[0] for times in answers)
    gaps = sorted(b - a for times in answers for a, b in pairwise(times[1:]))
    num_tokens = sum(len(times) - 1 for times in answers)
    took_s = max(times[-1] for times in answers) - min(times[0] for times in answers)

    def ms(values: list[float], share: float) -> float:
        return round(1e3 * values[int(share * (len(values) - 1))], 2)

    return {
        "requests": len(answers),
        "tokens_per_s": round(num_tokens / took_s, 1),
        "ttft_ms": {"p50": ms(firsts, 0.5), "p99": ms(firsts, 0.99)},
        "itl_ms": {"p50": ms(gaps, 0.5), "p99": ms(gaps, 0.99)},
    }


if __name__ == "__main__":
    sys.exit(serve_random(sys.argv[1:]))
