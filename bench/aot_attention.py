"""The kernels of attention as they are launched, for bench/aot.py to compile.

Counts are per element of keys and values.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from bench.aot_linear import Case
from kernels.gpu import device
from kernels.gpu.attention import SPLITS_AT_ONCE
from kernels.gpu.attention_kernel import chunk_kernel, join_kernel, split_kernel
from kernels.paged_attention import KV_SPLIT, MAX_SPLIT_QUERIES

SHARED = {
    "block_tables": "*i32", "context_lens": "*i32", "cu_seqlens_q": "*i32",
    "table_width": "i32", "num_kv_heads": "i32", "group": "i32", "tiles": "i32",
    "window": "i32", "scale": "fp32", "q_stride": "i32", "k_scales": "*u8", "v_scales": "*u8",
}  # fmt: skip


def attention_case(
    what: str, arch: int, *, group: int = 1, head_dim: int = 128, block_size: int = 16,
    cache: str = "bf16", windowed: bool = False,
) -> Case:  # fmt: skip
    """The kernel for splits of few new tokens, or for chunks of many."""
    plan = device.ATTENTION_PLANS[arch // 10, arch % 10]
    q = "fp16" if cache == "fp16" or (cache == "fp8" and arch < 80) else "bf16"
    is_fp8 = cache == "fp8"
    stored = "i16" if is_fp8 else cache
    if what == "split":
        rows, keys = max(16, triton.next_power_of_2(group)), plan.split_keys
    else:
        rows, keys = plan.chunk_rows, plan.chunk_keys_fp8 if is_fp8 else plan.chunk_keys
    num_warps = plan.split_warps if what == "split" else plan.chunk_warps
    types = SHARED | {"q": f"*{q}", "k_cache": f"*{stored}", "v_cache": f"*{stored}"}
    constants: dict[str, Any] = {
        "QUERIES": MAX_SPLIT_QUERIES, "WINDOWED": windowed, "HEAD_DIM": head_dim,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "BLOCK_SIZE": block_size, "KEYS": keys, "FP8": is_fp8, "ASM": True, "ROWS": rows,
        "DTYPE": tl.bfloat16 if stored == "bf16" else tl.float16, "PRECISION": "ieee",
    }  # fmt: skip
    if what == "split":
        types |= {
            "partial": "*fp32", "stats": "*fp32", "first_seq": "i32", "max_splits": "i32",
        }  # fmt: skip
        constants |= {"ROOM": 1, "SPLIT": KV_SPLIT}
    else:
        types |= {"out": f"*{q}", "num_seqs": "i32", "out_stride": "i32"}
    name = f"attention {what}, {cache}, {head_dim} wide, blocks of {block_size}"
    name += ", window" if windowed else ""
    name += ", no tensor cores" if arch < 80 else ""
    return Case(
        name,
        split_kernel if what == "split" else chunk_kernel,
        types, constants, 2 * keys * head_dim / (32 * num_warps), num_warps=num_warps,
        num_stages=plan.split_stages if what == "split" else plan.chunk_stages, arches=(arch,),
    )  # fmt: skip


def join_case(arch: int) -> Case:
    """The kernel that joins splits."""
    names = (
        "context_lens", "cu_seqlens_q", "num_kv_heads", "group", "window",
    )  # fmt: skip
    types = {name: SHARED[name] for name in names} | {
        "out": "*bf16", "partial": "*fp32", "stats": "*fp32", "first_seq": "i32",
        "max_splits": "i32", "out_stride": "i32",
    }  # fmt: skip
    constants = {
        "QUERIES": MAX_SPLIT_QUERIES, "ROOM": 1, "WINDOWED": False, "SPLIT": KV_SPLIT,
        "HEAD_DIM": 128, "HALF": 64, "FP8": False, "AT_ONCE": SPLITS_AT_ONCE,
    }  # fmt: skip
    return Case(
        "attention join", join_kernel, types, constants, SPLITS_AT_ONCE * 128 / 32, num_warps=1,
        is_loop=False, arches=(arch,),
    )  # fmt: skip


def attention_cases() -> list[Case]:
    """Both kernels on every architecture, and what else changes the code."""
    return [
        *(attention_case("split", arch) for arch in (80, 86, 89, 90, 100, 120)),
        attention_case("split", 75, cache="fp16"),
        attention_case("split", 90, block_size=64),
        attention_case("split", 90, head_dim=64),
        attention_case("split", 90, head_dim=96),
        attention_case("split", 90, group=8, windowed=True),
        *(attention_case("split", arch, cache="fp8") for arch in (75, 80, 86, 89, 90, 100, 120)),
        *(attention_case("chunk", arch) for arch in (80, 86, 89, 90, 100, 120)),
        attention_case("chunk", 75, cache="fp16"),
        attention_case("chunk", 90, block_size=64),
        attention_case("chunk", 90, head_dim=64),
        attention_case("chunk", 90, head_dim=96),
        *(attention_case("chunk", arch, cache="fp8") for arch in (75, 80, 89, 90, 100, 120)),
        join_case(90),
    ]
