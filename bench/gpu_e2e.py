"""The whole engine on a GPU: tokens per second, milliseconds per step, share of what memory allows.

    python -m bench.gpu_e2e                          # 7B, 13B and 65B; perhaps twenty minutes
    python -m bench.gpu_e2e --shapes 65B --only decode prefill
    python -m bench.gpu_e2e --tiny --device cpu      # tries the script itself, in seconds

Parts   decode (batches, as served, with --async-scheduling off and with --enforce-eager), prefill
        (prompt lengths), adapters (1, 8 and 64 distinct ones beside the base), speculation (a text
        that repeats itself), peer
        (transformers with bitsandbytes, where it is installed: bench/gpu_e2e_transformers.py), http
        (Poisson arrivals at a server: bench/gpu_e2e_http.py, where fastapi and httpx are there).
Weights are random NF4, made on the device (bench/random_model.py). Requests go through
Engine.step(), greedily, ignoring eos. "share" is the bytes that a step must read (4-bit weights,
16-bit head, keys and values) over its time, over the copy bandwidth that the device shows.
Results go to bench/results/gpu_e2e-<device>.json after every row.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.overhead import git_commit, slug
from bench.random_model import MAX_LEN, VOCAB_SIZE, random_adapter, use_random_weights, write_folder
from engine.api import AdapterRef, GenerateRequest, SamplingParams
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.model_config import ModelSpec
from engine.startup import create_engine

RESULTS = Path(__file__).parent / "results"
PARTS = ("decode", "prefill", "adapters", "speculation", "peer", "http")
BATCHES = (1, 8, 32, 64, 128)
PROMPTS = (512, 2048, 8192)
ADAPTERS = (1, 8, 64)
CONTEXT = 512
"""Tokens that a sequence has when decoding is timed."""
SPECULATION = '{"num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'


def main() -> None:
    options = parse_options()
    device = torch.device(options.device)
    result: dict[str, Any] = {
        "command": "python -m bench.gpu_e2e " + " ".join(options.words),
        "commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_gb_per_s": round(copy_bandwidth(device, options.copy_bytes) / 1e9, 1),
        "rows": [],
    }
    path = options.output or RESULTS / f"gpu_e2e-{slug(result['device'])}.json"
    use_random_weights()
    with tempfile.TemporaryDirectory() as root:
        for shape in options.shapes:
            folder = write_folder(shape, Path(root), with_tokenizer="http" in options.only)
            for row in measure_shape(shape, folder, options, result["copy_gb_per_s"] * 1e9):
                result["rows"].append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="*", default=["7B", "13B", "65B"])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--prompts", type=int, nargs="*", default=list(PROMPTS))
    parser.add_argument("--adapters", type=int, nargs="*", default=list(ADAPTERS))
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 4, 16], help="requests/s")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals, for each rate")
    parser.add_argument("--copy-bytes", type=int, default=4 << 30, help="of the bandwidth's copy")
    parser.add_argument("--tiny", action="store_true", help="a toy model: tries the script out")
    parser.add_argument("--output", type=Path, help="result file")
    options = parser.parse_args(words)
    if options.tiny:
        options.shapes, options.batches, options.prompts = ["tiny"], [1, 3], [20, 60]
        options.adapters, options.rates, options.seconds = [1, 2], [5.0], 1.0
        options.context, options.steps, options.copy_bytes = 16, 8, 1 << 20
    options.words = [f"--shapes {' '.join(options.shapes)}", f"--only {' '.join(options.only)}"]
    options.words += ["--tiny"] if options.tiny else []
    return options


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a large copy: the best of five."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(timed(device, lambda: target.copy_(source)) for _ in range(5))


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started_s


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_shape(
    shape: str, folder: Path, options: argparse.Namespace, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """All rows of one model."""
    if {"decode", "prefill", "adapters", "speculation"} & set(options.only):
        for mode, flags in modes(options):
            load = Load(folder, options, **flags)
            yield {"shape": shape, "what": "memory", "mode": mode, **load.memory()}
            for row in load.rows(mode, set(options.only), bandwidth):
                yield {"shape": shape, **row}
            load.close()
            del load
            gc.collect()  # the next one takes what this one took
            if options.device == "cuda":
                torch.cuda.empty_cache()
    if "peer" in options.only:
        from bench.gpu_e2e_transformers import measure_peer

        for row in measure_peer(shape, options):
            yield {"shape": shape, **row}
            torch.cuda.empty_cache()
    if "http" in options.only:
        from bench.gpu_e2e_http import measure_http

        for row in measure_http(folder, options):
            yield {"shape": shape, **row}


def modes(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The engine as it serves, then waiting for each step, without graphs, with guessed tokens."""
    yield "served", {}
    if options.device == "cuda" and "decode" in options.only:
        yield "waiting", {"async_scheduling": "off"}
        yield "eager", {"enforce_eager": True}
    if "speculation" in options.only:
        yield "guessing", {"speculative_config": SPECULATION}


class Load:
    """One engine over random weights, and what is asked of it."""

    def __init__(self, folder: Path, options: argparse.Namespace, **flags: Any) -> None:
        self._options = options
        self._folder = folder
        self._device = torch.device(options.device)
        most = max(*options.batches, *options.adapters)
        self._max_tokens = max(2048, most)
        num_adapters = max(options.adapters) if "adapters" in options.only else 1
        config = EngineConfig(
            model=ModelConfig(
                base=str(folder), device=options.device, max_model_len=self._max_len(options)
            ),
            cache=CacheConfig(
                enable_prefix_caching=False,
                kv_cache_memory_bytes=None if options.device == "cuda" else 64 << 20,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=most, max_num_batched_tokens=self._max_tokens, **flags
            ),
            lora=LoraConfig(max_loras=num_adapters, max_cpu_loras=max(num_adapters, 32)),
        )
        made = create_engine(config, folder, random_adapter, lambda *_: None)
        self.engine: Engine = made[0]
        self.info = made[1]
        self._spec = ModelSpec.from_folder(folder)
        self._num_added = 0

    @staticmethod
    def _max_len(options: argparse.Namespace) -> int:
        longest = max(options.context + 4 * options.steps, *options.prompts) + 64
        return min(MAX_LEN, longest)

    def rows(self, mode: str, parts: set[str], bandwidth: float) -> Iterator[dict[str, Any]]:
        """What this engine is there for."""
        options = self._options
        if mode == "guessing":
            for batch in options.batches[:2]:
                yield {"what": "speculation", **self.speculation(batch)}
            return
        if "decode" in parts:
            for batch in options.batches:
                found = self.decode(batch, 0, bandwidth)
                yield {"what": "decode", "mode": mode, "batch": batch, **found}
        if mode != "served":
            return
        if "prefill" in parts:
            for num_tokens in options.prompts:
                yield {"what": "prefill", "tokens": num_tokens, **self.prefill(num_tokens)}
        if "adapters" in parts:
            batch = max(options.adapters)
            base = self.decode(batch, 0, bandwidth)
            for count in options.adapters:
                found = self.decode(batch, count, bandwidth)
                row = {"what": "adapters", "batch": batch, "adapters": count, **found}
                if "skipped" not in row:
                    row["of_base"] = round(found["tokens_per_s"] / base["tokens_per_s"], 3)
                yield row

    def memory(self) -> dict[str, Any]:
        """Gigabytes of each part, as the engine tells at start, and tokens in the KV cache."""
        parts = {name: round(num_bytes / 1e9, 2) for name, num_bytes in self.info.memory}
        return {"gb": parts, "kv_tokens": self.info.num_kv_blocks * self.info.block_size}

    def decode(self, batch: int, num_adapters: int, bandwidth: float) -> dict[str, Any]:
        """Steps in which each of `batch` sequences gets a token."""
        options = self._options
        num_warm_up = 16  # graphs are recorded when the pool has settled
        num_tokens = options.steps + num_warm_up + 8
        num_tokens += -(-batch * options.context // self._max_tokens)  # until the last one begins
        room = self.info.num_kv_blocks * self.info.block_size // batch
        room -= num_tokens + self.info.block_size
        prompt_len = min(options.context, room)
        if prompt_len < 8:
            return {"skipped": "the KV cache does not hold so many"}
        for index in range(batch):
            self._add(prompt_len, num_tokens, index % num_adapters if num_adapters else None)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {delta.request_id for delta in self.engine.step().deltas if delta.token_ids}
        for _ in range(num_warm_up):
            self.engine.step()
        times_s = [self._step_s() for _ in range(options.steps)]
        self._clear()
        step_s = statistics.median(times_s)
        context = prompt_len + num_warm_up + options.steps // 2
        return {
            "context": context,
            "tokens_per_s": round(batch / step_s, 1),
            "ms_per_step": round(1e3 * step_s, 3),
            "p99_ms": round(1e3 * sorted(times_s)[int(0.99 * (len(times_s) - 1))], 3),
            "share": round(self.step_bytes(batch, context) / step_s / bandwidth, 3),
        }

    def _step_s(self) -> float:
        """Seconds between one step's tokens and the next one's: the next may be in flight."""
        started_s = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started_s

    def step_bytes(self, batch: int, context: int) -> int:
        """What a decode step must read: all weights but the embedding, and the keys and values."""
        spec = self._spec
        embedding = 2 * spec.vocab_size * spec.hidden_size
        per_token = 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        return self.info.weights_bytes - embedding + batch * context * per_token

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        """From a prompt to its first token, the best of three."""

        def run() -> None:
            self._add(num_tokens, 1, None)
            while not any(delta.token_ids for delta in self.engine.step().deltas):
                pass

        seconds = min(timed(self._device, run) for _ in range(3))
        self._clear()
        return {"tokens_per_s": round(num_tokens / seconds, 1), "ms": round(1e3 * seconds, 1)}

    def speculation(self, batch: int) -> dict[str, Any]:
        """Tokens per second where guesses are right: random models soon repeat themselves."""
        for _ in range(batch):
            self._add(self._options.context, 4 * self._options.steps, None)
        tokens = 0
        for _ in range(self._options.steps // 4):
            self.engine.step()
        stats = self.engine.step().stats
        drafts, right = stats.num_draft_tokens, stats.num_accepted_tokens
        started_s = time.perf_counter()
        for _ in range(self._options.steps // 2):
            output = self.engine.step()
            tokens += sum(len(delta.token_ids) for delta in output.deltas)
        seconds = time.perf_counter() - started_s
        drafts, right = (
            output.stats.num_draft_tokens - drafts,
            output.stats.num_accepted_tokens - right,
        )
        self._clear()
        return {
            "batch": batch,
            "tokens_per_s": round(tokens / seconds, 1),
            "acceptance": round(right / max(1, drafts), 3),
        }

    def close(self) -> None:
        self.engine.close()

    def _add(self, prompt_len: int, max_tokens: int, adapter: int | None) -> None:
        self._num_added += 1
        ref = None
        if adapter is not None:
            path = str(self._folder)
            ref = AdapterRef(uid=adapter + 1, generation=1, name=f"adapter-{adapter}", path=path)
        prompt = tuple((97 * self._num_added + 31 * i) % VOCAB_SIZE for i in range(prompt_len))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(
            GenerateRequest(
                request_id=str(self._num_added), prompt_token_ids=prompt, params=params, adapter=ref
            )
        )

    def _clear(self) -> None:
        self.engine.cancel_all()
        while self.engine.has_work():
            self.engine.step()


if __name__ == "__main__":
    main()
