"""Low-rank updates on the GPU: two launches for all adapters, slices and tokens of a layer.

The adapters of the pool are reached through tables of addresses, one per pool change. Shrink: a
program takes one adapter, one slice, one share of the columns and up to 32 tokens; it leaves at
once where none of the tokens is the adapter's, else reads its share of a and multiplies. Expand:
the same for a stretch of the slice's columns, adding into y. So each adapter in use is read once
per step of up to 32 tokens, others not at all, and the grid depends on the number of tokens and on
the pool only, not on who is in the batch.

Numerics are the reference's (kernels/lora.py): x is cast to the adapter's dtype, both products are
rounded to it, the update is scaled and added in float32. Tokens that are not the adapter's are
zeros in its product, and no sum runs over tokens: a result does not depend on the neighbours.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import device as gpu
from kernels.lora import LoraSlice

MAX_RANK = 256
COLUMNS = 64
"""Columns of y per program of expand."""
SPLIT_SIZE = 1024
"""Columns of x per program of shrink."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """Where the adapters of one layer are: [num_slices, num_rows] each, on the device."""

    slices: tuple[weakref.ref[LoraSlice], ...]
    a: Tensor
    """int64, addresses; 0 where the adapter leaves the slice alone, as below."""
    b: Tensor
    ranks: Tensor
    """int32."""
    bounds: Tensor
    """int32 [num_slices, 2]: start and stop."""
    max_rank: int
    max_width: int
    dtype: torch.dtype
    is_aligned: bool
    """Whether every row of a and b starts at a multiple of 16 bytes."""


_tables: weakref.WeakKeyDictionary[LoraSlice, _Tables | None] = weakref.WeakKeyDictionary()


def tables_of(slices: Sequence[LoraSlice], device: torch.device) -> _Tables | None:
    """The tables of these slices, made at their first use; None: they are not for these kernels."""
    if slices[0] in _tables:
        tables = _tables[slices[0]]
        if tables is None:
            return None
        if len(tables.slices) == len(slices) and all(
            ref() is part for ref, part in zip(tables.slices, slices, strict=True)
        ):
            return tables
    tables = _tables[slices[0]] = _make_tables(slices, device)
    return tables


def _make_tables(slices: Sequence[LoraSlice], device: torch.device) -> _Tables | None:
    pairs = [row for part in slices for row in part.rows if row is not None]
    tensors = [tensor for pair in pairs for tensor in pair]
    num_rows = {len(part.rows) for part in slices}
    if len(num_rows) != 1 or not tensors:
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    max_rank = max(a.shape[0] for a, _ in pairs)
    usable = len(dtypes) == 1 and max_rank <= MAX_RANK
    if not usable or not all(t.is_contiguous() and t.device == device for t in tensors):
        return None
    a, b, ranks = (
        [[0 if row is None else value(row) for row in part.rows] for part in slices]
        for value in (
            lambda row: row[0].data_ptr(),
            lambda row: row[1].data_ptr(),
            lambda row: row[0].shape[0],
        )
    )
    element = tensors[0].element_size()
    return _Tables(
        slices=tuple(weakref.ref(part) for part in slices),
        a=_sent(a, torch.int64, device),
        b=_sent(b, torch.int64, device),
        ranks=_sent(ranks, torch.int32, device),
        bounds=_sent([[s.start, s.stop] for s in slices], torch.int32, device),
        max_rank=max_rank,
        max_width=max(part.stop - part.start for part in slices),
        dtype=tensors[0].dtype,
        is_aligned=all(
            tensor.data_ptr() % 16 == tensor.shape[1] * element % 16 == 0 for tensor in tensors
        ),
    )


def _sent(values: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device, without waiting for the step that may run there."""
    table = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


_VARYING = ["num_tokens", "num_rows", "num_splits"]
"""Sizes that no variant of the kernels is compiled for."""


@triton.jit(do_not_specialize=_VARYING)
def _shrink_kernel(
    partial, x, a_table, ranks, lora_indices, num_rows, num_tokens, row_size, x_stride,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
    TOKENS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows * splits, num_slices, token tiles); partial [slice, split, token, RANK]."""
    row = tl.program_id(0) % num_rows
    split = tl.program_id(0) // num_rows
    place = tl.program_id(1) * num_rows + row
    rank = tl.load(ranks + place)
    tokens = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    index = tl.load(lora_indices + tokens, mask=tokens < num_tokens, other=-1)
    is_mine = index == row
    if (rank > 0) & (tl.max(is_mine.to(tl.int32), 0) > 0):
        a = tl.load(a_table + place).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            a = tl.multiple_of(a, 16)
            rank = tl.multiple_of(rank, 8)
        r = tl.arange(0, RANK)
        acc = tl.zeros([TOKENS, RANK], tl.float32)
        for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, row_size), BLOCK):
            column = start + tl.arange(0, BLOCK)
            there = column < row_size
            x_tile = tl.load(
                x + tokens[:, None] * x_stride + column[None, :],
                mask=is_mine[:, None] & there[None, :], other=0.0,
            ).to(DTYPE)  # fmt: skip
            a_tile = tl.load(
                a + r[None, :] * row_size + column[:, None],
                mask=(r < rank)[None, :] & there[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                a_tile = a_tile.to(tl.float32)
            acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
        num_splits = tl.num_programs(0) // num_rows
        at = (tl.program_id(1) * num_splits + split) * num_tokens + tokens
        tl.store(partial + at[:, None] * RANK + r[None, :], acc, mask=is_mine[:, None])


@triton.jit(do_not_specialize=_VARYING)
def _expand_kernel(
    y, partial, b_table, ranks, bounds, lora_indices, lora_scales, num_rows, num_tokens,
    num_splits, y_stride,
    ALIGNED: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows * tiles of columns, num_slices, token tiles)."""
    row = tl.program_id(0) % num_rows
    tile = tl.program_id(0) // num_rows
    part = tl.program_id(1)
    rank = tl.load(ranks + part * num_rows + row)
    begin = tl.load(bounds + part * 2)
    width = tl.load(bounds + part * 2 + 1) - begin
    tokens = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    index = tl.load(lora_indices + tokens, mask=tokens < num_tokens, other=-1)
    is_mine = index == row
    is_used = (rank > 0) & (tl.max(is_mine.to(tl.int32), 0) > 0)
    if is_used & (tile * COLUMNS < width):
        b = tl.load(b_table + part * num_rows + row).to(tl.pointer_type(DTYPE))
        if ALIGNED:
            b = tl.multiple_of(b, 16)
            rank = tl.multiple_of(rank, 8)
        r = tl.arange(0, RANK)
        hidden = tl.zeros([TOKENS, RANK], tl.float32)
        for split in range(0, num_splits):
            at = (part * num_splits + split) * num_tokens + tokens
            hidden += tl.load(
                partial + at[:, None] * RANK + r[None, :],
                mask=is_mine[:, None] & (r < rank)[None, :], other=0.0,
            )  # fmt: skip
        hidden = hidden.to(DTYPE)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        b_tile = tl.load(
            b + column[None, :] * rank + r[:, None],
            mask=(column < width)[None, :] & (r < rank)[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            hidden = hidden.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        update = tl.dot(hidden, b_tile, input_precision="ieee").to(DTYPE).to(tl.float32)
        scale = tl.load(lora_scales + tokens, mask=is_mine, other=0.0)
        to = y + tokens[:, None] * y_stride + begin + column[None, :]
        there = is_mine[:, None] & (column < width)[None, :]
        before = tl.load(to, mask=there, other=0.0).to(tl.float32)
        result = before + update * scale[:, None]
        tl.store(to, result.to(y.dtype.element_ty), mask=there)


def shrink_block(rank: int, capability: gpu.Capability) -> int:
    """Columns of x at a time, so that nothing spills; without tensor cores registers are short."""
    if (0, 0) < capability < (8, 0):
        return 16
    return 128 if rank <= 32 else 64


def accepts(
    y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor
) -> bool:
    """Whether the kernels can take these arguments of add_lora."""
    return (
        len(slices) > 0
        and gpu.runs_here(y, x, lora_indices, lora_scales)
        and y.stride(1) == x.stride(1) == 1
        and tables_of(slices, y.device) is not None
    )


def run(
    y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor
) -> None:
    """add_lora for arguments that were accepted."""
    tables = tables_of(slices, y.device)
    assert tables is not None
    num_tokens, row_size = x.shape
    if num_tokens == 0:
        return
    num_slices, num_rows = tables.ranks.shape
    tokens = 16 if num_tokens <= 16 else 32
    rank = max(16, triton.next_power_of_2(tables.max_rank))
    num_splits = triton.cdiv(row_size, SPLIT_SIZE)
    token_tiles = triton.cdiv(num_tokens, tokens)
    partial = torch.empty(
        num_slices, num_splits, num_tokens, rank, dtype=torch.float32, device=x.device
    )
    options = {
        "ALIGNED": tables.is_aligned, "DTYPE": TRITON_DTYPES[tables.dtype],
        "UPCAST": gpu.interpreting(), "TOKENS": tokens, "RANK": rank,
    }  # fmt: skip
    block = shrink_block(rank, gpu.capability(x.device))
    _shrink_kernel[(num_rows * num_splits, num_slices, token_tiles)](
        partial, x, tables.a, tables.ranks, lora_indices, num_rows, num_tokens, row_size,
        x.stride(0), **options, SPLIT=SPLIT_SIZE, BLOCK=block,
    )  # fmt: skip
    column_tiles = triton.cdiv(tables.max_width, COLUMNS)
    _expand_kernel[(num_rows * column_tiles, num_slices, token_tiles)](
        y, partial, tables.b, tables.ranks, tables.bounds, lora_indices, lora_scales, num_rows,
        num_tokens, num_splits, y.stride(0), **options, COLUMNS=COLUMNS,
    )  # fmt: skip


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
