"""Few tokens times 4-bit weights in plain Triton: for chips and shapes the decode kernel declines.

No inline assembly and no tensor cores. A program of one warp takes a few rows of a weight and one
token; codes are looked up in a 16-entry table held across the warp's lanes (tl.gather within one
warp is a shuffle), products are summed in float32 per 32 weights, or 8 where groups straddle rows,
and then scaled. The codebook and the scales are exact: only the result is rounded.

x comes permuted, float32 [num_tokens, 8, in_features / 8]: then the eight weights of a 32-bit word
meet eight contiguous loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebooks import DYNAMIC_MAP, QuantType, codebook
from kernels.dispatch import batch_invariant
from kernels.gpu import device as gpu
from kernels.nf4 import QuantizedWeight

ROWS = 4
WORDS = 128


@triton.jit(do_not_specialize=["num_rows"])
def _portable_kernel(
    x, out, packed, absmax, nested, offset, bias, values, scale_map,
    num_rows, row_words, group_size, out_stride,
    DOUBLE_QUANT: tl.constexpr, HAS_BIAS: tl.constexpr, WORDS_PER_SCALE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(num_rows / ROWS), num_tokens). packed int32 [num_rows, row_words]."""
    SCALES: tl.constexpr = WORDS // WORDS_PER_SCALE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    safe_row = tl.minimum(row, num_rows - 1)
    table = tl.load(values + tl.arange(0, 16))
    x += token * row_words * 8
    acc = tl.zeros([ROWS, SCALES], tl.float32)
    for start in range(0, row_words, WORDS):
        word = start + tl.arange(0, WORDS)
        codes = tl.load(
            packed + safe_row[:, None] * row_words + word[None, :],
            mask=(word < row_words)[None, :], other=0,
        )  # fmt: skip
        total = tl.zeros([ROWS, WORDS], tl.float32)
        for j in tl.static_range(8):
            shift = 8 * (j // 2) + 4 * (1 - j % 2)
            index = ((codes >> shift) & 15).reshape([ROWS * WORDS])
            weight = tl.gather(table, index, 0).reshape([ROWS, WORDS])
            xj = tl.load(x + j * row_words + word, mask=word < row_words, other=0.0)
            total += weight * xj[None, :]
        first = start + tl.arange(0, SCALES) * WORDS_PER_SCALE
        there = (first < row_words)[None, :]
        group = (safe_row[:, None] * row_words + first[None, :]) // (group_size // 8)
        if DOUBLE_QUANT:
            code = tl.load(absmax + group, mask=there, other=0).to(tl.int32)
            fine = tl.load(nested + group // 256, mask=there, other=0.0)
            scale = tl.load(scale_map + code) * fine + tl.load(offset)
        else:
            scale = tl.load(absmax + group, mask=there, other=0.0)
        acc += tl.sum(total.reshape([ROWS, SCALES, WORDS_PER_SCALE]), 2) * scale
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + safe_row).to(tl.float32)
    tl.store(out + token * out_stride + row, result.to(out.dtype.element_ty), mask=row < num_rows)


def accepts(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether the portable kernel can take these arguments of nf4_linear."""
    return (
        gpu.runs_here(x, *(w.packed for w in weights), *biases)
        and (len(x) <= gpu.MAX_PORTABLE_TOKENS or batch_invariant())
        and x.shape[1] % 8 == 0
        and all(weight.packed.data_ptr() % 4 == 0 for weight in weights)
    )


def run(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """nf4_linear for arguments that were accepted: a launch per slice."""
    num_tokens, row_size = x.shape
    out = x.new_empty(num_tokens, sum(weight.shape[0] for weight in weights))
    if num_tokens == 0:
        return out
    permuted = x.reshape(num_tokens, row_size // 8, 8).transpose(1, 2).float().contiguous()
    start = 0
    for weight, bias in zip(weights, biases, strict=True):
        num_rows = weight.shape[0]
        values, scale_map = tables(weight.quant_type, x.device)
        _portable_kernel[(triton.cdiv(num_rows, ROWS), num_tokens)](
            permuted, out[:, start:], weight.packed.view(torch.int32), weight.absmax,
            weight.absmax if weight.nested_absmax is None else weight.nested_absmax,
            weight.absmax if weight.nested_offset is None else weight.nested_offset,
            x if bias is None else bias, values, scale_map,
            num_rows, row_size // 8, weight.group_size, out.stride(0),
            DOUBLE_QUANT=weight.nested_absmax is not None, HAS_BIAS=bias is not None,
            WORDS_PER_SCALE=4 if row_size % 32 == 0 else 1, ROWS=ROWS, WORDS=WORDS, num_warps=1,
        )  # fmt: skip
        start += num_rows
    return out


@cache
def tables(quant_type: QuantType, device: torch.device) -> tuple[Tensor, Tensor]:
    """The codebook and the map of 8-bit scales, float32 [16] and [256], on the device."""
    return codebook(quant_type).to(device), DYNAMIC_MAP.to(device)
