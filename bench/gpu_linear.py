"""4-bit linear layers on a GPU: first whether they are right, then how fast they are.

    python -m bench.gpu_linear                    # all; about ten minutes on an H200
    python -m bench.gpu_linear --only correctness
    python -m bench.gpu_linear --only sweep       # plans for kernels/gpu/device.py
    TRITON_INTERPRET=1 python -m bench.gpu_linear --tiny   # tries the script itself, on a CPU

Every kernel is compared with float64 before anything is timed. A timing is one replay of a CUDA
graph that calls the operation on one weight after another, copies that fill more than 1 GB, so that
no cache holds them: the median of several replays, per call. Beside it stand bitsandbytes' call
(where it is installed) and F.linear with a 16-bit weight. "share" is the bytes of the weight in
its format, tokens and result included, per second, over the copy bandwidth that the device shows.

Results go to bench/results/gpu_linear-<device>.json. Nothing is imported but torch, triton, numpy,
safetensors, transformers (bitsandbytes is optional), and the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from kernels.codebooks import codebook
from kernels.fused import silu_and_mul_reference
from kernels.gpu import codec, decode, dense, lora, portable, register
from kernels.gpu import device as gpu
from kernels.lora import LoraSlice
from kernels.nf4 import QuantizedWeight, decode_absmax, quantize_4bit

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "7B o": ((4096,), 4096),
    "7B q|k|v": ((4096,) * 3, 4096),
    "7B gate": ((11008,), 4096),
    "7B gate|up": ((11008,) * 2, 4096),
    "7B down": ((4096,), 11008),
    "65B o": ((8192,), 8192),
    "65B q|k|v": ((8192,) * 3, 8192),
    "65B gate": ((22016,), 8192),
    "65B gate|up": ((22016,) * 2, 8192),
    "65B down": ((8192,), 22016),
}
TINY_SHAPES = {"tiny": ((40,), 256), "tiny fused": ((32, 16), 512)}
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 2048)
ROTATED_BYTES = 1 << 30
Call = Callable[[], Any]


def random_weight(rows: int, columns: int, device: torch.device) -> QuantizedWeight:
    """An NF4 weight with double quantisation of normal numbers."""
    return quantize_4bit(torch.randn(rows, columns, device=device) * 0.02)


def copy_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight elsewhere in memory."""
    assert weight.nested_absmax is not None
    return replace(
        weight, packed=weight.packed.clone(), absmax=weight.absmax.clone(),
        nested_absmax=weight.nested_absmax.clone(),
    )  # fmt: skip


def plain_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight with float32 scales."""
    scales = decode_absmax(weight).contiguous()
    return replace(weight, absmax=scales, nested_absmax=None, nested_offset=None)


def exact(weight: QuantizedWeight, dtype: torch.dtype | None) -> Tensor:
    """float64 [out_features, in_features]: codebook, rounded to dtype if given, times scale."""
    values = codebook(weight.quant_type).to(weight.device)
    values = (values if dtype is None else values.to(dtype)).double()
    packed = weight.packed.long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    scales = decode_absmax(weight).double().repeat_interleave(weight.group_size)
    return (values[codes] * scales).view(weight.shape)


def time_us(calls: Sequence[Call], device: torch.device, replays: int = 9) -> float:
    """Median microseconds per call of a graph of all the calls."""
    if device.type != "cuda":  # to try the script out
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1], calls[0]):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_us([lambda: target.copy_(source)] * 4, device) * 1e6


def check_correctness(device: torch.device, shapes: dict[str, Any]) -> list[dict[str, Any]]:
    """Every kernel against float64, at every number of tokens: relative error of each."""
    results = []
    dtypes = (torch.float16,) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    for name, (widths, columns) in shapes.items():
        weights = [random_weight(rows, columns, device) for rows in widths]
        for dtype in dtypes:
            rounded = torch.cat([exact(weight, dtype) for weight in weights])
            for num_tokens in (1, 3, 8, 9, 16, 17, 33, 64, 100):
                x = torch.randn(num_tokens, columns, device=device, dtype=dtype)
                biases = [torch.randn(rows, device=device, dtype=dtype) for rows in widths]
                expected = x.double() @ rounded.T + torch.cat(biases).double()
                for kernel in (decode, portable, dense):
                    if not kernel.accepts(x, weights, biases):
                        continue
                    first = kernel.run(x, weights, biases)
                    error = (first.double() - expected).abs().max() / expected.abs().max()
                    again = torch.equal(first, kernel.run(x, weights, biases))
                    alone = kernel.run(x[-1:], weights, biases) if kernel is decode else first[-1:]
                    limit = 4e-3 if dtype == torch.float16 else 2e-2
                    result = {
                        "shape": name, "kernel": kernel.__name__.rpartition(".")[2],
                        "dtype": str(dtype), "num_tokens": num_tokens, "error": error.item(),
                        "is_deterministic": again,
                        "is_batch_invariant": torch.equal(alone[0], first[-1]),
                    }  # fmt: skip
                    ok = result["error"] < limit and again and result["is_batch_invariant"]
                    results.append(result | {"ok": ok})
                    if not ok:
                        print("WRONG", result, flush=True)
            if len(widths) == 2 and widths[0] == widths[1]:
                x = torch.randn(5, columns, device=device, dtype=dtype)
                both = silu_and_mul_reference(x.double() @ rounded.T)
                actual = decode.launch(x, weights, [None, None], silu=True)
                error = ((actual.double() - both).abs().max() / both.abs().max()).item()
                results.append(
                    {"shape": name, "kernel": "decode SiLU", "error": error, "ok": error < 2e-2}
                )
    return results


def check_self_tests(device: torch.device) -> list[dict[str, Any]]:
    """The start-up tests, and whether the table in shared memory gives all bytes' weights."""
    results = []
    for operation, implementation, test in register._candidates():
        problem = register.find_problem(
            lambda i=implementation, t=test: t(i.run, i.accepts, device)  # type: ignore[misc]
        )
        results.append({"operation": operation, "kernel": implementation.name, "problem": problem})
    weight = random_weight(64, 1024, device)
    weight.packed.copy_(torch.arange(256, device=device).repeat(128))
    eye = torch.eye(64, 1024, device=device).half()
    actual = decode.run(eye, [weight], [None]).T  # [64, 64], a weight each
    expected = exact(weight, torch.float16)[:, :64].half()
    # Products may be rounded twice on their way to 16 bits; neighbouring codes are far apart.
    is_off = (actual.float() - expected.float()).abs() > 2**-10 * expected.float().abs()
    problem = f"{int(is_off.sum())} weights are wrong" if is_off.any() else None
    results.append({"operation": "every byte by identity", "problem": problem})
    return results


def implementations(x: Tensor) -> Iterator[tuple[str, Any]]:
    """The ways in which this number of tokens can be multiplied."""
    yield "decode", decode
    if len(x) <= gpu.MAX_PORTABLE_TOKENS:
        yield "portable", portable
    if len(x) >= 16:
        yield "dense", dense


def time_shape(
    name: str, widths: Sequence[int], columns: int, device: torch.device, bandwidth: float,
    rotated_bytes: int, token_counts: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """All implementations at one shape."""
    weights = [random_weight(rows, columns, device) for rows in widths]
    num_bytes = sum(weight.num_bytes for weight in weights)
    copies = [weights]
    copies += [[copy_weight(w) for w in weights] for _ in range(rotated_bytes // num_bytes)]
    plain = [[plain_scales(w) for w in group] for group in copies]
    none: list[Tensor | None] = [None] * len(widths)
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    width = sum(widths)
    num_dense = max(2, rotated_bytes // (width * columns * 2) + 1)
    dense_weights = [
        torch.randn(width, columns, device=device, dtype=dtype) for _ in range(num_dense)
    ]
    theirs = bitsandbytes_weights(weights, copies)
    results = []
    for num_tokens in token_counts:
        x = torch.randn(num_tokens, columns, device=device, dtype=dtype)
        small = 2 * num_tokens * (columns + width)
        row: dict[str, Any] = {"shape": name, "num_tokens": num_tokens, "bytes": num_bytes}

        def note(
            what: str, calls: Sequence[Call], size: int, row: dict[str, Any] = row,
            small: int = small,
        ) -> None:  # fmt: skip
            try:
                us = time_us(calls, device)
            except Exception as error:
                row[what] = {"error": f"{type(error).__name__}: {error}"[:300]}
                return
            rate = (size + small) / us * 1e6
            row[what] = {"us": us, "gb_per_s": rate / 1e9, "share": rate / bandwidth}

        for kernel_name, kernel in implementations(x):
            if kernel_name == "decode" and num_tokens > 256:
                continue
            if kernel_name == "decode":
                calls = [partial(decode.launch, x, w, none) for w in copies]
                plain_calls = [partial(decode.launch, x, w, none) for w in plain]
                note("decode float32 scales", plain_calls, sum(w.num_bytes for w in plain[0]))
            else:
                calls = [partial(kernel.run, x, w, none) for w in copies]
            note(kernel_name, calls, num_bytes)
        if len(widths) == 2 and widths[0] == widths[1] and num_tokens <= 64:
            note("decode SiLU", [partial(decode.launch, x, w, none, silu=True) for w in copies],
                 num_bytes)  # fmt: skip
        note("F.linear 16-bit", [partial(functional.linear, x, w) for w in dense_weights],
             width * columns * 2)  # fmt: skip
        if theirs:
            note("bitsandbytes", [partial(call, x) for call in theirs], num_bytes)
        best = min((row[k]["us"] for k in ("decode", "dense") if "us" in row.get(k, {})), default=0)
        for other in ("F.linear 16-bit", "bitsandbytes"):
            if best and "us" in row.get(other, {}):
                row[f"times faster than {other}"] = row[other]["us"] / best
        results.append(row)
        print(describe(row), flush=True)
    return results


def bitsandbytes_weights(
    weights: Sequence[QuantizedWeight], copies: Sequence[Sequence[QuantizedWeight]]
) -> list[Callable[[Tensor], Any]]:
    """bitsandbytes' call on every copy; slices one after another. Empty where not installed."""
    if weights[0].device.type != "cuda":
        return []
    try:
        import bitsandbytes as bnb
        from bitsandbytes.functional import QuantState
    except ImportError:
        return []

    def state_of(weight: QuantizedWeight) -> Any:
        code = codebook(weight.quant_type).to(weight.device)
        from kernels.codebooks import DYNAMIC_MAP

        nested = QuantState(
            absmax=weight.nested_absmax, code=DYNAMIC_MAP.to(weight.device), blocksize=256,
            dtype=torch.float32,
        )  # fmt: skip
        return QuantState(
            absmax=weight.absmax, shape=torch.Size(weight.shape), code=code, blocksize=64,
            quant_type="nf4", dtype=torch.bfloat16, offset=weight.nested_offset, state2=nested,
        )  # fmt: skip

    def call(group: Sequence[QuantizedWeight]) -> Callable[[Tensor], Any]:
        parts = [(weight.packed.view(-1, 1), state_of(weight)) for weight in group]
        return lambda x: [bnb.matmul_4bit(x, packed.t(), state) for packed, state in parts]

    return [call(group) for group in copies]


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row['shape']:12} {row['num_tokens']:5}"]
    for what, value in row.items():
        if isinstance(value, dict):
            if "us" in value:
                parts.append(f"{what} {value['us']:.1f} us ({value['share']:.0%})")
            else:
                parts.append(f"{what} failed: {value['error'][:60]}")
        elif what.startswith("times"):
            parts.append(f"{value:.2f} {what}")
    return " | ".join(parts)


def time_codec(
    device: torch.device, bandwidth: float, rows: int, columns: int
) -> list[dict[str, Any]]:
    """Dequantise and quantise: share of their bytes at copy bandwidth."""
    weight = random_weight(rows, columns, device)
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    size = weight.num_bytes + out.nbytes
    results = []
    for what, call in (
        ("dequantise", lambda: codec.dequantize_into(out, weight)),
        ("quantise", lambda: codec.quantize_groups(out, "nf4", 64)),
    ):
        us = time_us([call] * 4, device)
        row = {
            "what": what,
            "shape": [rows, columns],
            "us": us,
            "share": size / us * 1e6 / bandwidth,
        }
        results.append(row)
        print(row, flush=True)
    return results


def time_lora(
    device: torch.device, hidden: int, inner: int, num_tokens: int = 32, rank: int = 16
) -> dict[str, Any]:
    """A layer's seven linear layers in four calls: without adapters, and with one per token."""
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16

    def pair(width: int, columns: int) -> tuple[Tensor, Tensor]:
        a = torch.randn(rank, columns, device=device, dtype=dtype) * 0.01
        return a, torch.randn(width, rank, device=device, dtype=dtype) * 0.01

    def slices(widths: Sequence[int], columns: int) -> list[LoraSlice]:
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [
            LoraSlice(start, start + width, [pair(width, columns) for _ in range(num_tokens)])
            for start, width in zip(starts, widths, strict=True)
        ]

    shapes = [
        ((hidden,) * 3, hidden),
        ((hidden,), hidden),
        ((inner,) * 2, hidden),
        ((hidden,), inner),
    ]
    indices = torch.arange(num_tokens, device=device).int()
    scales = torch.ones(num_tokens, device=device)
    layers = []
    for widths, columns in shapes:
        weights = [random_weight(width, columns, device) for width in widths]
        x = torch.randn(num_tokens, columns, device=device, dtype=dtype)
        layers.append((x, weights, slices(widths, columns)))

    def step(has_lora: bool) -> None:
        for x, weights, parts in layers:
            y = decode.launch(x, weights, [None] * len(weights))
            if has_lora:
                lora.run(y, x, parts, indices, scales)

    base, mixed = (time_us([partial(step, h)] * 4, device) for h in (False, True))
    row = {"hidden": hidden, "num_tokens": num_tokens, "rank": rank, "base_us": base,
           "with_adapters_us": mixed, "added": mixed / base - 1}  # fmt: skip
    print(row, flush=True)
    return row


def sweep(device: torch.device, shapes: dict[str, Any], rotated_bytes: int) -> list[dict[str, Any]]:
    """Plans for the decode kernel, each shape at 1, 16 and 32 tokens; failures to launch too."""
    plans = [
        gpu.DecodePlan(rows=rows, num_warps=warps, num_stages=stages, programs_per_sm=programs)
        for rows, warps in ((64, 4), (128, 4), (256, 4), (256, 8))
        for stages in (3, 4, 5)
        for programs in (1, 2, 3, 4)
    ]
    results = []
    for name, (widths, columns) in shapes.items():
        weights = [random_weight(rows, columns, device) for rows in widths]
        size = sum(weight.num_bytes for weight in weights)
        copies = [weights]
        copies += [[copy_weight(w) for w in weights] for _ in range(rotated_bytes // size)]
        none: list[Tensor | None] = [None] * len(widths)
        for num_tokens in (1, 16, 32):
            x = torch.randn(num_tokens, columns, device=device).bfloat16()
            found = []
            for plan in plans:
                row: dict[str, Any] = {
                    "shape": name, "num_tokens": num_tokens, "rows": plan.rows,
                    "num_warps": plan.num_warps, "num_stages": plan.num_stages,
                    "programs_per_sm": plan.programs_per_sm,
                }  # fmt: skip
                try:
                    calls = [partial(decode.launch, x, w, none, plan=plan) for w in copies]
                    row["us"] = time_us(calls, device, replays=3)
                    found.append(row)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:200]
                results.append(row)
            for row in sorted(found, key=lambda row: row["us"])[:3]:
                print(row, flush=True)
    return results


def main() -> None:
    """Check, time, and write the results."""
    parser = argparse.ArgumentParser(description="Check and time the 4-bit linear kernels.")
    parser.add_argument("--only", choices=("correctness", "timing", "codec", "lora", "sweep"))
    parser.add_argument("--shapes", default="", help="only shapes whose name holds this text")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("no GPU is here; TRITON_INTERPRET=1 and --tiny try the script on a CPU")
    torch.manual_seed(0)
    tiny = arguments.tiny
    shapes = {n: s for n, s in (TINY_SHAPES if tiny else SHAPES).items() if arguments.shapes in n}
    rotated_bytes = 1 << 14 if tiny else ROTATED_BYTES
    bandwidth = copy_bandwidth(device, 1 << 16 if tiny else 2 << 30)
    gpu_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu, interpreted"
    print(f"{gpu_name}: copies at {bandwidth / 1e9:.0f} GB/s", flush=True)
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench.gpu_linear", *sys.argv[1:]]), "device": gpu_name,
        "torch": torch.__version__, "triton": triton.__version__,
        "copy_gb_per_s": bandwidth / 1e9,
    }  # fmt: skip
    name = gpu_name.replace(" ", "-").replace(",", "").lower()
    output = arguments.output or RESULTS / f"gpu_linear-{name}.json"
    chosen = arguments.only

    def wanted(part: str) -> bool:
        return chosen in (None, part)

    def save() -> None:
        """After each part, so that a fault loses one part only."""
        if not tiny or arguments.output:
            output.write_text(json.dumps(report, indent=1) + "\n")

    if wanted("correctness"):
        report["self_tests"] = check_self_tests(device)
        report["correctness"] = check_correctness(device, shapes)
        wrong = [r for r in report["correctness"] if not r["ok"]]
        wrong += [r for r in report["self_tests"] if r["problem"]]
        print(f"correctness: {len(report['correctness'])} cases, {len(wrong)} wrong", flush=True)
        save()
        if wrong:
            sys.exit("\n".join(map(str, wrong)))
    if wanted("codec"):
        report["codec"] = time_codec(device, bandwidth, *((64, 512) if tiny else (22016, 8192)))
        save()
    if wanted("timing"):
        report["timing"] = []
        for shape, (widths, columns) in shapes.items():
            report["timing"] += time_shape(
                shape, widths, columns, device, bandwidth, rotated_bytes,
                (1, 16) if tiny else NUM_TOKENS,
            )  # fmt: skip
            save()
    if wanted("lora"):
        sizes = [(256, 512)] if tiny else [(4096, 11008), (8192, 22016)]
        report["lora"] = [time_lora(device, *size, num_tokens=4 if tiny else 32) for size in sizes]
        save()
    if chosen == "sweep":
        report["sweep"] = sweep(device, shapes, rotated_bytes)
        save()


if __name__ == "__main__":
    main()
