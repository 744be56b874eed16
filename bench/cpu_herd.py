"""Herd's part of bench/cpu.py: one engine in this process, driven through Engine.step().

Run      python -m bench.cpu_herd FOLDER --threads N    (bench/cpu.py does); prints JSON
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

import bench.as_served  # noqa: F401  (first: it acts before PyTorch is there)
from adapters.format import read_ref
from bench.cpu_load import best, memory_row, resident_bytes, speed_row
from bench.cpu_models import NUM_ADAPTERS, VOCAB_SIZE, make_adapter
from engine.api import AdapterRef, GenerateRequest, SamplingParams
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.model_config import ModelSpec
from engine.startup import create_engine

KV_BYTES = 512 << 20


class Load:
    """One engine and what is asked of it."""

    def __init__(self, engine: Engine, refs: list[AdapterRef]) -> None:
        self.engine = engine
        self.refs = refs
        self._random = random.Random(0)

    def add(self, index: int, prompt_len: int, max_tokens: int, ref: AdapterRef | None) -> None:
        """One request with a prompt of its own."""
        prompt = tuple(self._random.randrange(3, VOCAB_SIZE) for _ in range(prompt_len))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(
            GenerateRequest(
                request_id=str(index), prompt_token_ids=prompt, params=params, adapter=ref
            )
        )

    def decode_s(
        self, batch: int, num_adapters: int, num_steps: int, prompt_len: int = 32
    ) -> float:
        """Seconds of num_steps steps in which each of `batch` sequences gets a token."""
        for index in range(batch):
            ref = self.refs[index % num_adapters] if num_adapters else None
            self.add(index, prompt_len, num_steps + 2 * batch + 8, ref)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {delta.request_id for delta in self.engine.step().deltas if delta.token_ids}
        started = time.perf_counter()
        for _ in range(num_steps):
            output = self.engine.step()
        seconds = time.perf_counter() - started
        assert len(output.deltas) == batch, "a sequence ended early"
        self._clear()
        return seconds

    def prefill_s(self, num_tokens: int, num_adapters: int) -> float:
        """Seconds from a prompt of num_tokens to its first token."""
        self.add(0, num_tokens, 1, self.refs[0] if num_adapters else None)
        started = time.perf_counter()
        while not any(delta.token_ids for delta in self.engine.step().deltas):
            pass
        seconds = time.perf_counter() - started
        self._clear()
        return seconds

    def _clear(self) -> None:
        self.engine.cancel_all()
        while self.engine.has_work():
            self.engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 512, 2048])
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1, NUM_ADAPTERS])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=float, default=15, help="seconds for a row at most")
    parser.add_argument("--lm-head-dtype", default="auto")
    parser.add_argument("--cpu-activations", default="full")
    options = parser.parse_args()
    folder = options.folder
    paths = [make_adapter(folder, seed) for seed in range(NUM_ADAPTERS)]
    refs = [
        AdapterRef(uid=i + 1, generation=1, name=f"adapter-{i}", path=str(path))
        for i, path in enumerate(paths)
    ]
    before_bytes = resident_bytes()
    spec = ModelSpec.from_folder(folder / "nf4")
    config = EngineConfig(
        model=ModelConfig(
            base="x",
            device="cpu",
            threads=options.threads,
            lm_head_dtype=options.lm_head_dtype,
            cpu_activations=options.cpu_activations,
        ),
        cache=CacheConfig(enable_prefix_caching=False, kv_cache_memory_bytes=KV_BYTES),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=2048),
        lora=LoraConfig(max_loras=NUM_ADAPTERS),
    )
    engine, info = create_engine(
        config, folder / "nf4", functools.partial(read_ref, spec=spec), lambda *_: None
    )
    load = Load(engine, refs)
    load.decode_s(1, 0, 4)
    embedding = engine.model.embed_tokens  # which a step does not read, and which may be on disk
    embedding_bytes = embedding.nbytes if isinstance(embedding, torch.Tensor) else 0
    rows: list[dict[str, Any]] = [
        {
            "kind": "memory",
            "read_bytes": info.weights_bytes - embedding_bytes,
            "weights_bytes": info.weights_bytes,
            "kv_cache_bytes": info.kv_cache_bytes,
            "resident_before_bytes": before_bytes,
            **memory_row(),
            "load_s": round(info.load_s, 2),
        }
    ]
    for num_adapters in options.adapters:
        for batch in options.batches:
            if num_adapters > 1 and batch != num_adapters:
                continue
            run = functools.partial(load.decode_s, batch, num_adapters, options.steps)
            row = best(run, options.repeats, options.patience)
            num_tokens = batch * options.steps
            rows.append(speed_row("decode", batch, num_adapters, num_tokens, row))
        for num_tokens in options.prompts if num_adapters < 2 else ():
            run = functools.partial(load.prefill_s, num_tokens, num_adapters)
            row = best(run, options.repeats, options.patience)
            rows.append(speed_row("prefill", num_tokens, num_adapters, num_tokens, row))
    print(json.dumps(rows))
    engine.close()


if __name__ == "__main__":
    main()
