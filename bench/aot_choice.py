"""The kernels that choose tokens as they are launched, for bench/aot.py to compile.

Counts are per token of a split, of choosing per packed weight that is looked at at a time.
"""

from __future__ import annotations

from typing import Any

import triton

from bench.aot_linear import Case
from kernels.gpu import choice, choice_kernel
from kernels.truncation import NUM_MEMBERS

VOCAB_SIZE = 128256
TABLES = {
    "logits": "*fp32", "floats": "*fp32", "ints": "*i32", "positions": "*i64", "counts": "*i16",
    "addition_ids": "*i32", "amounts": "*fp32", "until": "*i32", "draft_ids": "*i32",
    "bitmask": "*i32", "num_rows": "i32", "vocab_size": "i32",
}  # fmt: skip


def choice_cases() -> list[Case]:
    """All four, for a vocabulary of 128256."""
    splits = triton.next_power_of_2(choice.num_splits(VOCAB_SIZE))
    columns = {"COLUMNS": choice.COLUMNS}
    of_splits = dict.fromkeys(("largest", "raw_largest", "raw_sum"), "*fp32")
    of_splits |= dict.fromkeys(("largest_id", "is_broken", "num_packed"), "*i32")
    of_splits |= {"scaled": "*fp32", "sums": "*fp64", "packed": "*fp32"}
    of_columns = {"column_largest": "*fp32", "raw_column": "*fp32", "raw_column_id": "*i32"}
    outputs = {"token_ids": "*i64", "logprobs": "*fp32", "top_logprobs": "*fp32", "top_ids": "*i64"}
    sizes = {"seeds": "*i64", "num_splits": "i32", "num_top": "i32"}
    types = TABLES | of_splits | of_columns | outputs | sizes
    per_split = choice.COLUMNS * NUM_MEMBERS / (32 * choice.SCAN_WARPS)

    def case(
        name: str, kernel: Any, constants: dict[str, int], weights: float, num_warps: int
    ) -> Case:
        used = {name: types[name] for name in kernel.arg_names if name not in constants}
        return Case(
            name, kernel, used, constants, weights, num_warps=num_warps, is_loop=False,
            enable_fp_fusion=False, arches=(75, 80, 90),
        )  # fmt: skip

    wide = columns | {"SPLITS": splits}
    return [
        case("choice, scan", choice_kernel.scan_kernel, columns, per_split, choice.SCAN_WARPS),
        case("choice, weigh", choice_kernel.weigh_kernel, wide, per_split, choice.SCAN_WARPS),
        case(
            "choice, choose", choice_kernel.choose_kernel,
            wide | {"WIDTH": choice.AT_ONCE // splits},
            choice.AT_ONCE / (32 * choice.CHOOSE_WARPS), choice.CHOOSE_WARPS,
        ),
        case(
            "choice, report", choice_kernel.report_kernel, wide,
            splits * choice.COLUMNS / (32 * choice.REPORT_WARPS), choice.REPORT_WARPS,
        ),
    ]  # fmt: skip
