"""How long each operation takes, call overhead included: the small and the large shapes.

    python -m bench.kernels [--threads 1] [--output FILE]

Medians. Sizes are those of a toy (hidden size 256, as the demo's) and of a 1.1B model (2048).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.fused import add_rms_norm, apply_rotary, silu_and_mul
from kernels.linear import linear
from kernels.lora import LoraSlice, add_lora
from kernels.nf4 import dequantize_4bit, quantize_4bit
from kernels.nf4_linear import nf4_linear
from kernels.paged_attention import paged_attention, write_kv_cache

DTYPE = torch.bfloat16
BLOCK_SIZE = 16


def median_us(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """Median time of a call in microseconds, after a few to warm up."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def attention(
    num_seqs: int, context_len: int, num_new: int, num_heads: int, num_kv_heads: int
) -> Callable[[], Any]:
    """Attention with head_dim 64 of equal sequences whose blocks lie in random order."""
    num_blocks = -(-context_len // BLOCK_SIZE)
    cache = torch.randn(num_seqs * num_blocks, BLOCK_SIZE, num_kv_heads, 64).to(DTYPE)
    tables = torch.randperm(num_seqs * num_blocks).view(num_seqs, num_blocks).int()
    q = torch.randn(num_seqs * num_new, num_heads, 64).to(DTYPE)
    lens, bounds = torch.full((num_seqs,), context_len), torch.arange(num_seqs + 1) * num_new
    return lambda: paged_attention(
        q, cache, cache, tables, lens.int(), bounds.int(), scale=64**-0.5
    )


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what, call) of every line of the table."""
    torch.manual_seed(0)
    weight = torch.randn(2048, 2560).to(DTYPE) * 0.02
    large = quantize_4bit(weight)
    yield "quantise 5.2M weights", lambda: quantize_4bit(weight)
    yield "dequantise 5.2M weights", lambda: dequantize_4bit(large)
    for hidden, kv in ((256, 128), (2048, 256)):
        qkv = [quantize_4bit(torch.randn(out, hidden).to(DTYPE)) for out in (hidden, kv, kv)]
        dense = torch.randn(hidden, hidden).to(DTYPE)
        pair = (torch.randn(8, hidden).to(DTYPE), torch.randn(hidden, 8).to(DTYPE))
        slices = [LoraSlice(0, hidden, [pair])]
        for num_tokens in (1, 512):
            x = torch.randn(num_tokens, hidden).to(DTYPE)
            y, rows, scales = x.clone(), torch.zeros(num_tokens).int(), torch.ones(num_tokens)
            size = f"hidden {hidden}, {num_tokens} tokens"
            yield f"nf4_linear q|k|v, {size}", partial(nf4_linear, x, qkv, [None] * 3)
            yield f"linear, {size}", partial(linear, x, dense)
            yield f"add_lora rank 8, {size}", partial(add_lora, y, x, slices, rows, scales)
    x, norm = torch.randn(1, 256).to(DTYPE), torch.ones(256, dtype=DTYPE)
    heads, angles = torch.randn(1, 4, 64).to(DTYPE), torch.randn(1, 32)
    gate_up, slot = torch.randn(1, 1408).to(DTYPE), torch.tensor([5])
    cache = torch.zeros(2, BLOCK_SIZE, 4, 64, dtype=DTYPE)
    yield "add_rms_norm, hidden 256, 1 token", lambda: add_rms_norm(x, x, norm, 1e-5)
    yield "apply_rotary, 4 heads, 1 token", lambda: apply_rotary(heads, heads, angles, angles)
    yield "silu_and_mul, size 704, 1 token", lambda: silu_and_mul(gate_up)
    yield "write_kv_cache, 1 token", lambda: write_kv_cache(heads, heads, cache, cache, slot)
    for shape in ((1, 200, 1, 4, 4), (32, 200, 1, 4, 4), (1, 2000, 1, 4, 4), (1, 512, 512, 4, 4),
                  (8, 64, 64, 4, 4), (1, 2048, 512, 8, 2)):  # fmt: skip
        num_seqs, context_len, num_new, num_heads, num_kv_heads = shape
        what = f"{num_seqs} sequences of {context_len}, {num_new} new, heads {num_heads}"
        yield f"paged_attention, {what}/{num_kv_heads}", attention(*shape)


def main() -> None:
    """Print the table; write it as JSON where asked."""
    parser = argparse.ArgumentParser(description="Time each operation.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for what, call in cases():
        results[what] = round(median_us(call), 1)
        print(f"{results[what]:12.1f} us  {what}", flush=True)
    if arguments.output:
        report = {
            "command": f"python -m bench.kernels --threads {arguments.threads}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "torch": torch.__version__,
            "dtype": str(DTYPE),
            "median_us": results,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
