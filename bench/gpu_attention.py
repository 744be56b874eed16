"""Attention and what stands between the linear layers, on a GPU: first right, then fast.

    python -m bench.gpu_attention                     # all; some minutes on an H200
    python -m bench.gpu_attention --only correctness  # or decode, chunk, layers, sampling
    python -m bench.gpu_attention --only sweep        # plans for kernels/gpu/device.py
    TRITON_INTERPRET=1 python -m bench.gpu_attention --tiny   # tries the script itself, on a CPU

Every kernel is held against the references in float32 before anything is timed. A timing is one
replay of a CUDA graph that makes the call on one cache after another, copies that fill more than
1 GB, so that no cache of the chip holds them: the median of several replays, per call. Beside it
stands PyTorch's scaled_dot_product_attention on keys and values that lie together already, which
spares it the block tables. "share" is the bytes of keys, values and scales per second over the
copy bandwidth that the device shows; of chunks, TFLOP/s are given instead.

Results go to bench/results/gpu_attention-<device>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from bench.gpu_linear import ROTATED_BYTES, copy_bandwidth, time_us
from bench.gpu_sampling import time_sampling
from kernels.fp8_cache import FP8
from kernels.gpu import attention, register, rotary, rows
from kernels.gpu import device as gpu
from kernels.paged_attention import paged_attention_reference, write_kv_cache

RESULTS = Path(__file__).parent / "results"
SHAPES = {"8B, 32/8 heads": (32, 8, 128), "65B, 64 heads": (64, 64, 128)}
TINY_SHAPES = {"tiny": (4, 2, 64)}
DECODES = [
    (batch, context)
    for batch, context in itertools.product((1, 8, 32, 64), (512, 2048, 8192, 32768))
    if batch * context <= 1 << 18
]
CHUNKS = [(512, 0), (2048, 0), (2048, 6144), (8192, 0)]
"""New tokens, and tokens that are cached already."""
KINDS = {"bf16": torch.bfloat16, "fp8": FP8}
MAX_COPIES = 32


@dataclass(frozen=True, slots=True)
class Step:
    """Arguments of paged_attention for sequences of one length."""

    arguments: tuple[Any, ...]
    kv_bytes: int


def make_step(
    shape: tuple[int, int, int], parts: list[tuple[int, int]], block_size: int,
    kind: torch.dtype, device: torch.device, *, dtype: torch.dtype, window: int | None = None,
) -> Step:  # fmt: skip
    """Random sequences of (context length, new tokens), their blocks in random order."""
    num_heads, num_kv_heads, head_dim = shape
    lens = [context for context, _ in parts]
    num_blocks = [-(-length // block_size) for length in lens]
    size = (sum(num_blocks), block_size, num_kv_heads, head_dim)
    caches = [torch.zeros(size, dtype=torch.uint8, device=device).to(kind) for _ in range(2)]
    scales = None
    if kind == FP8:
        scales = tuple(torch.zeros(size[:3], dtype=torch.uint8, device=device) for _ in range(2))
    order = torch.randperm(size[0], device=device).int()
    tables = torch.full((len(parts), max(num_blocks)), -1, dtype=torch.int32, device=device)
    for seq, part in enumerate(order.split(num_blocks)):
        tables[seq, : len(part)] = part
    for start in range(0, size[0] * block_size, 1 << 16):
        slots = torch.arange(start, min(start + (1 << 16), size[0] * block_size), device=device)
        k, v = torch.randn(2, len(slots), num_kv_heads, head_dim, device=device, dtype=dtype)
        write_kv_cache(k, v, caches[0], caches[1], slots, scales)
    q = torch.randn(sum(n for _, n in parts), num_heads, head_dim, device=device, dtype=dtype)
    bounds = torch.tensor([0, *(n for _, n in parts)], device=device).cumsum(0).int()
    shared = q, *caches, tables, torch.tensor(lens, dtype=torch.int32, device=device), bounds
    last = (window,) if scales is None else (window, scales)
    per_token = 2 * num_kv_heads * (head_dim * kind.itemsize + (kind == FP8))
    return Step((*shared, head_dim**-0.5, *last), sum(lens) * per_token)


def make_steps(num_bytes: int, **options: Any) -> list[Step]:
    """As many steps as fill so many bytes."""
    first = make_step(**options)
    count = min(MAX_COPIES, num_bytes // max(1, first.kv_bytes))
    return [first, *(make_step(**options) for _ in range(count))]


def check_correctness(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Mixed batches against the reference in float32, and every self-test."""
    results: list[dict[str, Any]] = []
    parts = [(5, 5), (290, 33), (33, 1), (530, 1), (1, 1), (256, 3), (0, 1)]
    if not tiny:
        parts += [(5000, 1), (1500, 700), (4096, 2)]
    dtypes = (torch.float16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    heads = [(2, 1, 64)] if tiny else [(8, 8, 64), (8, 2, 96), (8, 1, 128), (7, 1, 128)]
    cases = itertools.product(heads, (16, 64), (None, 40), ("model", "fp8"), dtypes)
    for shape, block_size, window, kind, dtype in cases:
        cache = FP8 if kind == "fp8" else dtype
        step = make_step(shape, parts, block_size, cache, device, dtype=dtype, window=window)
        q, k_cache, v_cache, *rest = step.arguments
        if cache != FP8:
            k_cache, v_cache = k_cache.float(), v_cache.float()
        expected = paged_attention_reference(q.float(), k_cache, v_cache, *rest)
        actual = attention.run(*step.arguments).float()
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        results.append({
            "shape": shape, "block_size": block_size, "window": window, "cache": kind,
            "dtype": str(dtype), "relative_error": error, "ok": error < 2e-2,
        })  # fmt: skip
    for operation, implementation, test in register._candidates():
        problem = register.find_problem(
            partial(test, implementation.run, implementation.accepts, device)
        )
        results.append({
            "operation": operation, "name": implementation.name, "problem": problem,
            "ok": problem is None,
        })  # fmt: skip
    return results


def dense_sdpa(step: Step, device: torch.device) -> Any:
    """PyTorch's attention on the same sizes; keys and values lie together, head by head."""
    q, k_cache, _, _, lens, bounds, scale, *_ = step.arguments
    num_seqs, context = len(lens), int(lens[0])
    new = int(bounds[1])
    queries = torch.randn(num_seqs, q.shape[1], new, q.shape[2], device=device, dtype=q.dtype)
    kv = torch.randn(
        2, num_seqs, k_cache.shape[2], context, q.shape[2], device=device, dtype=q.dtype
    )
    mask = None
    if 1 < new < context:
        mask = torch.ones(new, context, dtype=torch.bool, device=device).tril(context - new)
    return partial(
        functional.scaled_dot_product_attention, queries, kv[0], kv[1], attn_mask=mask,
        is_causal=new == context and new > 1, scale=scale, enable_gqa=True,
    )  # fmt: skip


def time_decode(
    device: torch.device, bandwidth: float, shapes: dict[str, Any], sizes: list[tuple[int, int]],
    rotated_bytes: int, dtype: torch.dtype,
) -> list[dict[str, Any]]:  # fmt: skip
    """One new token a sequence."""
    results = []
    for (name, shape), (batch, context) in itertools.product(shapes.items(), sizes):
        row: dict[str, Any] = {"shape": name, "batch": batch, "context": context}
        for kind, block_size in itertools.product(KINDS, (16, 64)):
            steps = make_steps(
                rotated_bytes, shape=shape, parts=[(context, 1)] * batch, block_size=block_size,
                kind=dtype if kind == "bf16" else FP8, device=device, dtype=dtype,
            )  # fmt: skip
            us = time_us([partial(attention.run, *step.arguments) for step in steps], device)
            row[f"{kind}, blocks of {block_size}, us"] = us
            row[f"{kind}, blocks of {block_size}, share"] = steps[0].kv_bytes / us * 1e6 / bandwidth
            if kind == "bf16" and block_size == 16:
                row["sdpa, us"] = time_us([dense_sdpa(step, device) for step in steps], device)
            del steps
        print(row, flush=True)
        results.append(row)
    return results


def time_chunks(
    device: torch.device, shapes: dict[str, Any], sizes: list[tuple[int, int]], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One prompt chunk."""
    results = []
    for (name, shape), (new, cached) in itertools.product(shapes.items(), sizes):
        row: dict[str, Any] = {"shape": name, "new": new, "cached": cached}
        flops = 4 * shape[0] * shape[2] * new * (cached + (new + 1) / 2)
        for kind in KINDS:
            step = make_step(
                shape, [(cached + new, new)], 16, dtype if kind == "bf16" else FP8, device,
                dtype=dtype,
            )  # fmt: skip
            us = time_us([partial(attention.run, *step.arguments)] * 3, device)
            row[f"{kind}, us"], row[f"{kind}, TFLOP/s"] = us, flops / us / 1e6
            if kind == "bf16":
                row["sdpa, us"] = time_us([dense_sdpa(step, device)] * 3, device)
        print(row, flush=True)
        results.append(row)
    return results


def time_layers(
    device: torch.device, bandwidth: float, hidden: int, tokens: tuple[int, ...], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Norm, SiLU, rotary embedding with the cache's write: microseconds and share."""
    results = []
    for num_tokens in tokens:
        make = partial(torch.randn, device=device, dtype=dtype)
        x, residual, weight = make(num_tokens, hidden), make(num_tokens, hidden), make(hidden)
        gate_up = make(num_tokens, 2 * hidden)
        heads = make(num_tokens, hidden // 64, 64)
        angles = torch.randn(num_tokens, 32, device=device)
        cache = make(-(-num_tokens // 16), 16, hidden // 64, 64)
        slots = torch.arange(num_tokens, device=device)
        calls = {
            "add_rms_norm": (partial(rows.add_rms_norm, x, residual, weight, 1e-5), 4),
            "silu_and_mul": (partial(rows.silu_and_mul, gate_up), 3),
            "rotate_and_cache": (
                partial(
                    rotary.run, heads, heads, heads, angles, angles, cache, cache.clone(), slots,
                    None, 0.0, None,
                ),
                6,
            ),
        }  # fmt: skip
        for name, (call, times) in calls.items():
            us = time_us([call] * 8, device)
            share = times * x.nbytes / us * 1e6 / bandwidth
            results.append({"call": name, "num_tokens": num_tokens, "us": us, "share": share})
            print(results[-1], flush=True)
    return results


def sweep(
    device: torch.device, shapes: dict[str, Any], rotated_bytes: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Other plans than this device's, on decodes and a chunk; the best three of each."""
    key, results = gpu.capability(device), []
    plan = gpu.ATTENTION_PLANS[key]
    splits = [
        replace(plan, split_keys=keys, split_warps=warps, split_stages=stages, programs_per_sm=n)
        for keys, warps, stages, n in itertools.product(
            (32, 64, 128), (2, 4, 8), (2, 3, 4), (2, 4, 8)
        )
    ]
    chunks = [
        replace(
            plan, chunk_rows=tile, chunk_keys=keys, chunk_keys_fp8=keys, chunk_warps=warps,
            chunk_stages=stages,
        )
        for tile, keys, warps, stages in itertools.product(
            (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
        )
    ]  # fmt: skip
    works = [("decode", splits, [(2048, 1)] * 16, "split"), ("chunk", chunks, [(2048, 2048)], "ch")]
    for (name, shape), (what, plans, parts, prefix), kind in itertools.product(
        shapes.items(), works, KINDS
    ):
        steps = make_steps(
            rotated_bytes, shape=shape, parts=parts, block_size=16,
            kind=dtype if kind == "bf16" else FP8, device=device, dtype=dtype,
        )  # fmt: skip
        found: list[dict[str, Any]] = []
        for candidate in plans:
            gpu.ATTENTION_PLANS[key] = candidate
            fields = {n: v for n, v in asdict(candidate).items() if n.startswith((prefix, "prog"))}
            row: dict[str, Any] = {"shape": name, "what": what, "cache": kind, **fields}
            try:
                calls = [partial(attention.run, *step.arguments) for step in steps]
                row["us"] = time_us(calls, device, replays=3)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            found.append(row)
        gpu.ATTENTION_PLANS[key] = plan
        results += found
        for row in sorted((r for r in found if "us" in r), key=lambda r: r["us"])[:3]:
            print(row, flush=True)
    return results


def main() -> None:
    """Check, time, and write the results."""
    parser = argparse.ArgumentParser(description="Check and time attention and the small kernels.")
    parts = ("correctness", "decode", "chunk", "layers", "sampling", "sweep")
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny, chosen = arguments.tiny, arguments.only
    if device.type == "cpu" and not (tiny and gpu.interpreting()):
        sys.exit("no GPU is here; TRITON_INTERPRET=1 and --tiny try the script on a CPU")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    shapes = TINY_SHAPES if tiny else SHAPES
    rotated_bytes = 1 if tiny else ROTATED_BYTES
    bandwidth = copy_bandwidth(device, 1 << 16 if tiny else 2 << 30)
    gpu_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu, interpreted"
    print(f"{gpu_name}: copies at {bandwidth / 1e9:.0f} GB/s", flush=True)
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench.gpu_attention", *sys.argv[1:]]), "device": gpu_name,
        "torch": torch.__version__, "triton": triton.__version__,
        "copy_gb_per_s": bandwidth / 1e9,
    }  # fmt: skip
    name = gpu_name.replace(" ", "-").replace(",", "").lower()
    output = arguments.output or RESULTS / f"gpu_attention-{name}.json"
    works = {
        "correctness": lambda: check_correctness(device, tiny),
        "decode": lambda: time_decode(
            device, bandwidth, shapes, [(2, 300)] if tiny else DECODES, rotated_bytes, dtype
        ),
        "chunk": lambda: time_chunks(device, shapes, [(40, 20)] if tiny else CHUNKS, dtype),
        "layers": lambda: time_layers(
            device, bandwidth, 256 if tiny else 8192, (2,) if tiny else (1, 16, 64, 2048), dtype
        ),
        "sampling": lambda: time_sampling(
            device, (1000,) if tiny else (32000, 128256), (2,) if tiny else (1, 16, 64)
        ),
        "sweep": lambda: sweep(device, shapes, rotated_bytes, dtype),
    }
    for part, work in works.items():
        if part != chosen and (chosen is not None or part == "sweep"):
            continue
        report[part] = work()
        wrong = [row for row in report[part] if row.get("ok") is False]
        if part == "correctness":
            print(f"correctness: {len(report[part])} cases, {len(wrong)} wrong", flush=True)
        if not tiny or arguments.output:  # after each part, so that a fault loses one part only
            output.write_text(json.dumps(report, indent=1) + "\n")
        if wrong:
            sys.exit("\n".join(map(str, wrong)))


if __name__ == "__main__":
    main()
