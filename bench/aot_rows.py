"""Norms, rotary embedding, SiLU and sampling as they are launched, for bench/aot.py to compile.

Counts are per element of a row.
"""

from __future__ import annotations

from bench.aot_linear import Case
from kernels.gpu import rotary, rows, sampling
from kernels.truncation import NUM_MEMBERS

HIDDEN = 8192
HEAD_DIM = 128


def norm_case() -> Case:
    """The sum with the residual, normalised, as wide as a 65B model's."""
    warps = rows.norm_warps(HIDDEN)
    names = ("out", "total", "x", "residual", "weight")
    sizes = {"size": "i32", "eps": "fp32", "x_stride": "i32", "residual_stride": "i32"}
    return Case(
        "add_rms_norm, 8192 wide", rows._norm_kernel, dict.fromkeys(names, "*bf16") | sizes,
        {"HAS_RESIDUAL": True, "BLOCK": HIDDEN}, HIDDEN / (32 * warps), num_warps=warps,
        is_loop=False, arches=(75, 80, 90, 120),
    )  # fmt: skip


def silu_case() -> Case:
    """SiLU of the gate times the up."""
    types = {"out": "*bf16", "gate_up": "*bf16", "size": "i32", "stride": "i32"}
    return Case(
        "SiLU and product", rows._silu_kernel, types, {"BLOCK": rows.SILU_BLOCK},
        rows.SILU_BLOCK / 128, is_loop=False, arches=(75, 80, 90, 120),
    )  # fmt: skip


def rotary_case(*, is_fp8: bool) -> Case:
    """Norms, rotation and the cache's write."""
    types = dict.fromkeys(("out", "q", "k", "v", "q_norm", "k_norm"), "*bf16")
    types |= {"cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("k_cache", "v_cache"), "*u8" if is_fp8 else "*bf16")
    types |= {"k_scales": "*u8", "v_scales": "*u8"}
    sizes = ("num_heads", "num_kv_heads", "q_stride", "k_stride", "v_stride")
    return Case(
        "rotary and cache" + (", fp8" if is_fp8 else ""), rotary.rotary_kernel,
        types | dict.fromkeys(sizes, "i32"),
        {
            "HAS_NORM": True, "IS_FP8": is_fp8, "HEADS": rotary.HEADS, "HEAD_DIM": HEAD_DIM,
            "HALF": HEAD_DIM // 2,
        },
        rotary.HEADS * HEAD_DIM / 32, num_warps=1, is_loop=False, enable_fp_fusion=False,
        arches=(75, 80, 90, 120),
    )  # fmt: skip


def truncate_case() -> Case:
    """All rules."""
    types = {"probs": "*fp32", "min_p": "*fp32", "top_k": "*i64", "top_p": "*fp32"}
    return Case(
        "min-p, top-k, top-p", sampling.truncate_kernel, types | {"vocab_size": "i32"},
        {
            "HAS_MIN_P": True, "HAS_TOP_K": True, "HAS_TOP_P": True, "MEMBERS": NUM_MEMBERS,
            "COLUMNS": sampling.COLUMNS, "BLOCK": sampling.BLOCK,
        },
        sampling.BLOCK / (32 * 16), num_warps=16, is_loop=False, arches=(75, 80, 90, 120),
    )  # fmt: skip


def mask_case() -> Case:
    """A grammar's mask."""
    types = {"logits": "*fp32", "rows": "*i64", "bitmask": "*i32", "vocab_size": "i32"}
    return Case(
        "grammar mask", sampling.mask_kernel, types | {"num_words": "i32"},
        {"BLOCK": sampling.MASK_BLOCK}, sampling.MASK_BLOCK / 128, is_loop=False,
        arches=(75, 90, 120),
    )  # fmt: skip


def row_cases() -> list[Case]:
    """All that works row by row."""
    return [
        norm_case(),
        silu_case(),
        rotary_case(is_fp8=False),
        rotary_case(is_fp8=True),
        truncate_case(),
        mask_case(),
    ]
