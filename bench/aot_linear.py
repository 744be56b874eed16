"""The kernels of the linear layers as they are launched, for bench/aot.py to compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from kernels.gpu import codec, device, lora, portable
from kernels.gpu.decode_kernel import STEP, decode_kernel


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel as it is launched."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    weights: float
    """Weights per thread and turn of the loop, or of the whole kernel where is_loop is false."""
    num_warps: int = 4
    num_stages: int = 3
    is_loop: bool = True
    enable_fp_fusion: bool = True
    unaligned: tuple[str, ...] = ()
    arches: tuple[int, ...] = (80, 86, 89, 90)


def decode_case(
    tokens: int, *, slices: int = 1, double_quant: bool = True, silu: bool = False,
    plan: device.DecodePlan | None = None, dtype: str = "bf16", arches: tuple[int, ...] = (90,),
) -> Case:  # fmt: skip
    """The decode kernel for up to so many tokens."""
    plan = plan or device.DecodePlan()
    absmax = "*u8" if double_quant else "*fp32"
    types = {
        "x": f"*{dtype}", "out": f"*{dtype}", "workspace": "*fp32", "counters": "*i32",
        "table": "*i32", "residual": f"*{dtype}", "num_tokens": "i32", "row_size": "i32",
        "total_steps": "i32", "out_stride": "i32",
    }  # fmt: skip
    for i in range(3):
        types |= {
            f"packed{i}": "*u8", f"absmax{i}": absmax, f"nested{i}": "*fp32",
            f"offset{i}": "*fp32", f"bias{i}": f"*{dtype}", f"rows{i}": "i32",
        }  # fmt: skip
    kind = f"{slices} slices" if slices > 1 else "one weight"
    kind += "" if double_quant else ", float32 scales"
    kind += ", SiLU" if silu else ""
    return Case(
        name=f"decode {tokens} tokens, {kind}" + ("" if dtype == "bf16" else f", {dtype}"),
        kernel=decode_kernel,
        types=types,
        constants={
            "NUM_SLICES": slices, "TOKENS": tokens, "ROWS": plan.rows,
            "DOUBLE_QUANT": double_quant, "HAS_BIAS": slices > 1, "HAS_RESIDUAL": False,
            "SILU": silu, "ASM": True, "NUM_WARPS": plan.num_warps,
        },
        weights=STEP * plan.rows / (32 * plan.num_warps),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages - (tokens > 8),
        unaligned=("offset0", "offset1", "offset2"),
        arches=arches,
    )  # fmt: skip


def lora_cases(tokens: int, rank: int, arch: int) -> list[Case]:
    """Shrink and expand for adapters of up to this rank."""
    block = lora.shrink_block(rank, (arch // 10, arch % 10))
    where = "" if arch >= 80 else ", no tensor cores"
    common = {"ALIGNED": True, "DTYPE": tl.bfloat16, "UPCAST": False}
    table = {"ranks": "*i32", "lora_indices": "*i32", "num_rows": "i32", "num_tokens": "i32"}
    shrink = {"partial": "*fp32", "x": "*bf16", "a_table": "*i64", **table}
    expand = {"y": "*bf16", "partial": "*fp32", "b_table": "*i64", "bounds": "*i32", **table}
    return [
        Case(
            f"lora shrink {tokens} tokens, rank {rank}{where}", lora._shrink_kernel,
            shrink | {"row_size": "i32", "x_stride": "i32"},
            common | {"SPLIT": 1024, "TOKENS": tokens, "RANK": rank, "BLOCK": block},
            rank * block / 128, arches=(arch,),
        ),
        Case(
            f"lora expand {tokens} tokens, rank {rank}{where}", lora._expand_kernel,
            expand | {"lora_scales": "*fp32", "num_splits": "i32", "y_stride": "i32"},
            common | {"TOKENS": tokens, "RANK": rank, "COLUMNS": lora.COLUMNS},
            rank * lora.COLUMNS / 128, is_loop=False, arches=(arch,),
        ),
    ]  # fmt: skip


def linear_cases() -> list[Case]:
    """The linear layers, the codec and adapters."""
    codes = {
        "packed": "*u8", "absmax": "*u8", "nested": "*fp32", "offset": "*fp32",
        "values": "*fp32", "scale_map": "*fp32",
    }  # fmt: skip
    sizes = {"num_rows": "i32", "row_words": "i32", "group_size": "i32", "out_stride": "i32"}
    return [
        decode_case(8, arches=(80, 86, 89, 90, 100, 120)),
        decode_case(16, arches=(80, 90)),
        decode_case(32, arches=(86, 90, 100, 120)),
        decode_case(8, dtype="fp16"),
        decode_case(8, double_quant=False),
        decode_case(8, slices=3),
        decode_case(8, slices=2, silu=True),
        Case(
            "portable", portable._portable_kernel,
            codes | sizes | {"packed": "*i32", "x": "*fp32", "out": "*bf16", "bias": "*bf16"},
            {
                "DOUBLE_QUANT": True, "HAS_BIAS": False, "WORDS_PER_SCALE": 4,
                "ROWS": portable.ROWS, "WORDS": portable.WORDS,
            },
            portable.ROWS * portable.WORDS * 8 / 32, num_warps=1, unaligned=("out",),
            arches=(75, 90, 120),
        ),
        Case(
            "dequantise", codec._dequantize_kernel,
            codes | {"out": "*bf16", "numel": "i32"},
            {"GROUP": 64, "DOUBLE_QUANT": True, "IS_WHOLE": True, "BLOCK": codec.BLOCK},
            2 * codec.BLOCK / 128, is_loop=False, enable_fp_fusion=False,
            arches=(75, 80, 90, 100, 120),
        ),
        Case(
            "quantise", codec._quantize_kernel,
            {
                "packed": "*u8", "absmax": "*fp32", "weight": "*bf16", "midpoints": "*fp32",
                "code_of_rank": "*i32", "numel": "i32", "smallest": "fp32",
            },
            {"GROUPS": 32, "GROUP": 64}, 2048 / 128, is_loop=False, enable_fp_fusion=False,
            arches=(75, 90, 120),
        ),
        *lora_cases(16, 16, 90),
        *lora_cases(32, 64, 90),
        *lora_cases(16, 16, 75),
        *lora_cases(16, 16, 100),
        *lora_cases(16, 16, 120),
    ]  # fmt: skip
