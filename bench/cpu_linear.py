"""The native 4-bit product against the memory it must read: GB/s of 4.127-bit weights, GFLOP/s.

Run      python -m bench.cpu_linear [--quick]
Writes   bench/results/cpu_linear.json
Method   the projections of a 1.1B LLaMA (hidden 2048, intermediate 5632, 22 layers), each weight
         its own memory, so that nothing stays in a cache between two uses. One pass
         multiplies all with M tokens; the best of several passes counts. The limit is a stream of
         plain reads over the same bytes with the same threads. Wants an idle machine; the load
         average at the start is in the file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.native.library import load
from kernels.nf4 import NESTED_BLOCK, QuantizedWeight
from kernels.nf4_linear import nf4_linear, prepare_weight
from kernels.threads import physical_cores, set_num_threads

RESULT_FILE = Path(__file__).parent / "results" / "cpu_linear.json"
HIDDEN, KV, INTERMEDIATE, NUM_LAYERS = 2048, 256, 5632, 22
FUSED = (
    ((HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN)),
    ((HIDDEN, HIDDEN),),
    ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN)),
    ((HIDDEN, INTERMEDIATE),),
)
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 128, 512)


def random_weight(shape: tuple[int, int]) -> QuantizedWeight:
    """Random codes with scales of a usual size, ready for the kernels."""
    num_groups = shape[0] * shape[1] // 64
    num_blocks = -(-num_groups // NESTED_BLOCK)
    return prepare_weight(
        QuantizedWeight(
            packed=torch.randint(0, 256, (num_groups * 32,), dtype=torch.uint8),
            absmax=torch.randint(0, 256, (num_groups,), dtype=torch.uint8),
            nested_absmax=torch.full((num_blocks,), 0.02),
            nested_offset=torch.tensor(0.05),
            shape=shape,
            dtype=torch.bfloat16,
        )
    )


def best_s(run: Callable[[], None], num_passes: int) -> float:
    """Seconds of the fastest of several passes."""
    run()
    times = []
    for _ in range(num_passes):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def main() -> None:
    """Command line: measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few passes; writes no file")
    quick = parser.parse_args().quick
    num_passes = 3 if quick else 10
    layers = [[[random_weight(s) for s in part] for part in FUSED] for _ in range(NUM_LAYERS)]
    weights = [weight for layer in layers for part in layer for weight in part]
    num_bytes = sum(weight.num_bytes for weight in weights)
    num_products = sum(weight.numel for weight in weights)
    library: ctypes.CDLL = load(os.environ.get("HERD_NATIVE_ISA", "auto"))
    rows = []
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.2f}")
    print(f"{num_bytes / 1e9:.3f} GB, {8 * num_bytes / num_products:.3f} bits a weight")
    print(f"{'threads':>7} {'M':>4} {'ms':>8} {'GB/s':>6} {'of limit':>8} {'GFLOP/s':>8}")
    for num_threads in sorted({1, physical_cores()}):
        set_num_threads(num_threads)

        def read() -> None:
            for weight in weights:
                library.herd_read(weight.packed.data_ptr(), weight.packed.nbytes)

        read_bytes = sum(weight.packed.nbytes for weight in weights)
        limit = read_bytes / best_s(read, num_passes) / 1e9
        print(f"{num_threads:7} read {'':8} {limit:6.1f}")
        for num_tokens in TOKENS:
            inputs = {k: torch.randn(num_tokens, k).bfloat16() for k in (HIDDEN, INTERMEDIATE)}

            def multiply(inputs: dict[int, torch.Tensor] = inputs) -> None:
                for layer in layers:
                    for part in layer:
                        nf4_linear(inputs[part[0].shape[1]], part, [None] * len(part))

            seconds = best_s(multiply, num_passes if num_tokens <= 32 else 2)
            speed = num_bytes / seconds / 1e9
            flops = 2 * num_products * num_tokens / seconds / 1e9
            rows.append(
                {
                    "num_threads": num_threads,
                    "num_tokens": num_tokens,
                    "ms": round(1e3 * seconds, 3),
                    "gb_per_s": round(speed, 2),
                    "limit_gb_per_s": round(limit, 2),
                    "gflop_per_s": round(flops, 1),
                }
            )
            print(
                f"{num_threads:7} {num_tokens:4} {1e3 * seconds:8.2f} {speed:6.1f} "
                f"{speed / limit:8.2f} {flops:8.1f}"
            )
    if not quick:
        result = {
            "command": "python -m bench.cpu_linear",
            "cpu": platform.processor() or platform.machine(),
            "instruction_set": os.environ.get("HERD_NATIVE_ISA", "auto"),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "rows": rows,
        }
        RESULT_FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
