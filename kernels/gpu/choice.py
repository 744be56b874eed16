"""Host side of choosing tokens on the GPU: buffers and launches of gpu/choice_kernel.py.

Two launches where all rows are greedy, three where some draw, one more where log-probabilities are
wanted; nothing is waited for. Which launches there are depends on the batch, what a row's are does
not: a row's token has the same bits alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.choice import Chosen, TokenTables
from kernels.gpu import device as gpu
from kernels.gpu.choice_kernel import choose_kernel, report_kernel, scan_kernel, weigh_kernel
from kernels.truncation import NUM_MEMBERS

COLUMNS = 32
"""Columns of 128 tokens that one program has."""
SCAN_WARPS, CHOOSE_WARPS, REPORT_WARPS = 8, 16, 4
AT_ONCE = 4096
"""Packed weights that truncation looks at at a time."""
MAX_SPLITS = 128
"""A vocabulary of half a million."""


def num_splits(vocab_size: int) -> int:
    """Programs that share a row."""
    return -(-(vocab_size // NUM_MEMBERS + vocab_size % NUM_MEMBERS) // COLUMNS)


def accepts(logits: Tensor, tables: TokenTables | None) -> bool:  # noqa: ARG001
    """Whether the kernels can take logits like these; tables are made where they are."""
    is_plain = logits.is_contiguous() and logits.dtype == torch.float32
    return gpu.runs_here(logits) and is_plain and 0 < num_splits(logits.shape[1]) <= MAX_SPLITS


def run(logits: Tensor, tables: TokenTables) -> Chosen:
    """choose_tokens for arguments that were accepted."""
    (num_rows, vocab_size), device = logits.shape, logits.device
    splits = num_splits(vocab_size)
    at_once = triton.next_power_of_2(splits)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    num_reported, num_top = tables.num_reported, tables.num_top
    chosen = Chosen(
        empty(num_rows, dtype=torch.int64),
        empty(num_reported),
        empty(num_reported, num_top),
        empty(num_reported, num_top, dtype=torch.int64),
    )
    if num_rows == 0:
        return chosen
    largest, raw_largest, raw_sum = (empty(num_rows, splits) for _ in range(3))
    largest_id, is_broken = (empty(num_rows, splits, dtype=torch.int32) for _ in range(2))
    of_columns = empty(num_rows, splits * COLUMNS)
    raw_column = empty(num_reported, splits * COLUMNS)
    raw_column_id = empty(num_reported, splits * COLUMNS, dtype=torch.int32)
    sums = empty(num_rows, splits, dtype=torch.float64)
    num_packed = empty(num_rows, splits, dtype=torch.int32)
    scaled = packed = largest  # which greedy rows do not need; of the same type, as the kernels'
    if tables.has_draws:
        scaled, packed = (empty(num_rows, splits, COLUMNS * NUM_MEMBERS) for _ in range(2))
    floats, ints, positions, counts = tables.floats, tables.ints, tables.positions, tables.counts
    scan_kernel[(num_rows, splits)](
        logits, floats, ints, positions, counts, tables.addition_ids, tables.amounts, tables.until,
        tables.draft_ids, tables.bitmask, scaled, largest, largest_id, is_broken, of_columns,
        raw_largest, raw_sum, raw_column, raw_column_id, num_rows, vocab_size, COLUMNS=COLUMNS,
        num_warps=SCAN_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if tables.has_draws:
        weigh_kernel[(num_rows, splits)](
            floats, ints, scaled, largest, is_broken, of_columns, sums, packed, num_packed,
            num_rows, vocab_size, COLUMNS=COLUMNS, SPLITS=at_once, num_warps=SCAN_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    choose_kernel[(num_rows,)](
        chosen.token_ids, floats, ints, tables.seeds, positions, counts, scaled, largest,
        largest_id, is_broken, sums, packed, num_packed, num_rows, vocab_size, splits,
        COLUMNS=COLUMNS, SPLITS=at_once, WIDTH=AT_ONCE // at_once, num_warps=CHOOSE_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    if num_reported:
        report_kernel[(num_rows,)](
            chosen.logprobs, chosen.top_logprobs, chosen.top_ids, logits, tables.ints,
            chosen.token_ids, raw_largest, raw_sum, raw_column, raw_column_id, num_rows, num_top,
            vocab_size, splits, COLUMNS=COLUMNS, SPLITS=at_once, num_warps=REPORT_WARPS,
        )  # fmt: skip
    return chosen
