"""Truncation and the grammar's mask on the GPU, without sorting and without waiting for the device.

Truncation looks for the least probability that passes, bit by bit: what a rule keeps grows as the
bound falls, so its bound is the largest number that keeps enough. Probabilities are positive
floats, which compare as their bits do. Two bits at a time are fifteen readings of a row. Sums are
those of kernels/truncation.py, taken in float64, so both come to the same bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import device as gpu
from kernels.gpu.choice_kernel import column_sums
from kernels.truncation import NUM_MEMBERS

BLOCK = 8192
"""Tokens at a time."""
COLUMNS = 64
"""Of sum_columns, at a time."""
MASK_BLOCK = 1024


@triton.jit
def _column_total(probs, floor, vocab_size, MEMBERS: tl.constexpr, COLUMNS: tl.constexpr):
    """float64 sum of sum_columns' float32 sums, over what is at least the floor."""
    num_columns = vocab_size // MEMBERS
    total = tl.zeros([COLUMNS], tl.float64)
    member = tl.arange(0, MEMBERS)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tile = tl.load(
            probs + member[:, None] * num_columns + column[None, :],
            mask=(column < num_columns)[None, :], other=0.0,
        )  # fmt: skip
        tile = tl.where(tile >= floor, tile, 0.0)
        total += column_sums(tile, COLUMNS).to(tl.float64)
    alone = num_columns * MEMBERS + tl.arange(0, MEMBERS)
    last = tl.load(probs + alone, mask=alone < vocab_size, other=0.0)
    last = tl.where(last >= floor, last, 0.0)
    return tl.sum(total, 0) + tl.sum(last.to(tl.float64), 0)


@triton.jit
def _kth_largest(probs, k, vocab_size, BLOCK: tl.constexpr):
    """The largest number that k tokens reach."""
    base = tl.full([], 0, tl.int32)
    for step in range(15):
        shift = 28 - 2 * step
        one = tl.zeros([BLOCK], tl.int32)
        two = tl.zeros([BLOCK], tl.int32)
        three = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            p = tl.load(probs + token, mask=token < vocab_size, other=-1.0)
            bits = p.to(tl.int32, bitcast=True)
            one += (bits >= base + (1 << shift)).to(tl.int32)
            two += (bits >= base + (2 << shift)).to(tl.int32)
            three += (bits >= base + (3 << shift)).to(tl.int32)
        digit = (tl.sum(one, 0) >= k).to(tl.int32) + (tl.sum(two, 0) >= k).to(tl.int32)
        digit += (tl.sum(three, 0) >= k).to(tl.int32)
        base += digit << shift
    return base.to(tl.float32, bitcast=True)


@triton.jit
def _share_floor(probs, target, floor, vocab_size, BLOCK: tl.constexpr):
    """The largest number such that the tokens that reach it weigh at least target; else 0."""
    base = tl.full([], 0, tl.int32)
    for step in range(15):
        shift = 28 - 2 * step
        one = tl.zeros([BLOCK], tl.float64)
        two = tl.zeros([BLOCK], tl.float64)
        three = tl.zeros([BLOCK], tl.float64)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            p = tl.load(probs + token, mask=token < vocab_size, other=0.0)
            p = tl.where(p >= floor, p, 0.0)
            bits = p.to(tl.int32, bitcast=True)
            wide = p.to(tl.float64)
            one += tl.where(bits >= base + (1 << shift), wide, 0.0)
            two += tl.where(bits >= base + (2 << shift), wide, 0.0)
            three += tl.where(bits >= base + (3 << shift), wide, 0.0)
        digit = (tl.sum(one, 0) >= target).to(tl.int32) + (tl.sum(two, 0) >= target).to(tl.int32)
        digit += (tl.sum(three, 0) >= target).to(tl.int32)
        base += digit << shift
    return base.to(tl.float32, bitcast=True)


@triton.jit
def truncate_kernel(
    probs, min_p, top_k, top_p, vocab_size,
    HAS_MIN_P: tl.constexpr, HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr,
    MEMBERS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows); probs float32 [num_rows, vocab_size], in place."""
    row = tl.program_id(0)
    probs += row.to(tl.int64) * vocab_size
    floor = tl.full([], 0.0, tl.float32)
    if HAS_MIN_P:
        largest = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            largest = tl.maximum(
                largest, tl.load(probs + token, mask=token < vocab_size, other=0.0)
            )
        floor = tl.max(largest, 0) * tl.load(min_p + row)
    if HAS_TOP_K:
        k = tl.load(top_k + row)
        if (k > 0) & (k < vocab_size):
            floor = tl.maximum(floor, _kth_largest(probs, k.to(tl.int32), vocab_size, BLOCK))
    if HAS_TOP_P:
        share = tl.load(top_p + row)
        if share < 1.0:
            total = _column_total(probs, floor, vocab_size, MEMBERS, COLUMNS)
            target = share.to(tl.float64) * total
            floor = tl.maximum(floor, _share_floor(probs, target, floor, vocab_size, BLOCK))
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        there = token < vocab_size
        p = tl.load(probs + token, mask=there, other=0.0)
        tl.store(probs + token, tl.where(p >= floor, p, 0.0), mask=there)


@triton.jit
def mask_kernel(logits, rows, bitmask, vocab_size, num_words, BLOCK: tl.constexpr):
    """Grid (num_masks, stretches of tokens)."""
    mask = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = token < vocab_size
    word = tl.load(bitmask + mask * num_words + token // 32, mask=there, other=-1)
    is_forbidden = there & (((word >> (token % 32)) & 1) == 0)
    to = logits + tl.load(rows + mask) * vocab_size + token
    tl.store(to, tl.full([BLOCK], float("-inf"), tl.float32), mask=is_forbidden)


def accepts_truncate(
    probs: Tensor, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> bool:
    """Whether the kernel can take these arguments of truncate."""
    return gpu.runs_here(probs, min_p, top_k, top_p) and probs.is_contiguous()


def truncate(
    probs: Tensor, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> None:
    """truncate for arguments that were accepted."""
    num_rows, vocab_size = probs.shape
    if num_rows:
        truncate_kernel[(num_rows,)](
            probs, *(probs if rule is None else rule for rule in (min_p, top_k, top_p)), vocab_size,
            HAS_MIN_P=min_p is not None, HAS_TOP_K=top_k is not None, HAS_TOP_P=top_p is not None,
            MEMBERS=NUM_MEMBERS, COLUMNS=COLUMNS, BLOCK=BLOCK, num_warps=16,
        )  # fmt: skip


def accepts_bitmask(logits: Tensor, rows: list[int], bitmask: Tensor) -> bool:  # noqa: ARG001
    """Whether the kernel can take these arguments of apply_bitmask."""
    return gpu.runs_here(logits) and logits.is_contiguous() and logits.dtype == torch.float32


def apply_bitmask(logits: Tensor, rows: list[int], bitmask: Tensor) -> None:
    """apply_bitmask for arguments that were accepted: the mask travels as bits."""
    if rows:
        vocab_size = logits.shape[1]
        mask_kernel[(len(rows), triton.cdiv(vocab_size, MASK_BLOCK))](
            logits, _sent(torch.tensor(rows), logits.device), _sent(bitmask, logits.device),
            vocab_size, bitmask.shape[1], BLOCK=MASK_BLOCK,
        )  # fmt: skip


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device; whoever calls may overwrite it at once."""
    if device.type == "cpu":
        return tensor.contiguous()
    return tensor.pin_memory().to(device, non_blocking=True)
