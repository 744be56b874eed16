"""The 4-bit codec on the GPU: dequantise, and the codes and scales of quantising.

Both give the reference's bits: products and sums are rounded one by one (no fused multiply-add),
divisions as IEEE has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.codebooks import QuantType, codebook
from kernels.gpu import device as gpu
from kernels.gpu.portable import tables
from kernels.nf4 import FLOAT_DTYPES, SMALLEST_ABSMAX, QuantizedWeight

BLOCK = 1024


@triton.jit
def _dequantize_kernel(
    out, packed, absmax, nested, offset, values, scale_map, numel,
    GROUP: tl.constexpr, DOUBLE_QUANT: tl.constexpr, IS_WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program expands BLOCK bytes to 2 * BLOCK values. IS_WHOLE: no block is partial."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    byte = tl.arange(0, BLOCK)
    group = byte // (GROUP // 2)  # from the first of the block, which starts at one or lies in it
    first_group = start // (GROUP // 2)
    packed += start
    if IS_WHOLE:
        codes = tl.load(packed + byte).to(tl.int32)
    else:
        there = (start + byte) * 2 < numel
        codes = tl.load(packed + byte, mask=there, other=0).to(tl.int32)
        group = tl.where(there, group, 0)
    if DOUBLE_QUANT:
        code = tl.load(absmax + first_group + group).to(tl.int32)
        fine = tl.load(nested + (first_group + group) // 256)
        scale = tl.load(scale_map + code) * fine + tl.load(offset)
    else:
        scale = tl.load(absmax + first_group + group)
    high = tl.load(values + (codes >> 4)) * scale
    low = tl.load(values + (codes & 15)) * scale
    both = tl.interleave(high, low).to(out.dtype.element_ty)
    at = tl.arange(0, 2 * BLOCK)
    if IS_WHOLE:
        tl.store(out + start * 2 + at, both)
    else:
        tl.store(out + start * 2 + at, both, mask=start * 2 + at < numel)


def accepts_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether the kernel can take these arguments of dequantize_4bit."""
    return gpu.runs_here(weight.packed) and dtype in FLOAT_DTYPES


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dequantize_4bit for arguments that were accepted."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_into(out, weight)
    return out


def dequantize_into(out: Tensor, weight: QuantizedWeight) -> None:
    """Dequantise into a contiguous tensor of the weight's size."""
    values, scale_map = tables(weight.quant_type, weight.device)
    _dequantize_kernel[(triton.cdiv(weight.packed.numel(), BLOCK),)](
        out, weight.packed, weight.absmax,
        weight.absmax if weight.nested_absmax is None else weight.nested_absmax,
        weight.absmax if weight.nested_offset is None else weight.nested_offset,
        values, scale_map, weight.numel,
        GROUP=weight.group_size, DOUBLE_QUANT=weight.nested_absmax is not None,
        IS_WHOLE=weight.numel % (2 * BLOCK) == 0, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _quantize_kernel(
    packed, absmax, weight, midpoints, code_of_rank, numel, smallest,
    GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program quantises GROUPS groups of GROUP elements."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    pair = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]  # index of the byte
    even, odd = pair * 2, pair * 2 + 1
    high = tl.load(weight + even, mask=even < numel, other=0.0).to(tl.float32)
    low = tl.load(weight + odd, mask=odd < numel, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(high), tl.abs(low)), 1)
    # NaN is lost by the maximum; it comes back as a scale that is not finite.
    is_nan = tl.max(((high != high) | (low != low)).to(tl.int32), 1)
    divisor = tl.maximum(largest, smallest).to(tl.float32)
    # Full groups are multiplied by the reciprocal, a partial one is divided: kernels/nf4.py.
    reciprocal = tl.div_rn(tl.full([GROUPS], 1.0, tl.float32), divisor)[:, None]
    if (tl.program_id(0).to(tl.int64) + 1) * GROUPS * GROUP > numel:
        is_partial = (group + 1) * GROUP > numel
        largest = tl.where(is_partial, divisor, largest)
        wide = divisor[:, None] + tl.zeros_like(high)
        high = tl.where(is_partial[:, None], tl.div_rn(high, wide), high * reciprocal)
        low = tl.where(is_partial[:, None], tl.div_rn(low, wide), low * reciprocal)
    else:
        high = high * reciprocal
        low = low * reciprocal
    high = tl.minimum(tl.maximum(high, -1.0), 1.0)
    low = tl.minimum(tl.maximum(low, -1.0), 1.0)
    high_rank = tl.zeros([GROUPS, GROUP // 2], tl.int32)
    low_rank = tl.zeros([GROUPS, GROUP // 2], tl.int32)
    for i in tl.static_range(15):
        midpoint = tl.load(midpoints + i)
        high_rank += (high > midpoint).to(tl.int32)
        low_rank += (low > midpoint).to(tl.int32)
    codes = tl.load(code_of_rank + high_rank) * 16 + tl.load(code_of_rank + low_rank)
    tl.store(packed + pair, codes.to(tl.uint8), mask=even < numel)
    largest = tl.where(is_nan != 0, float("nan"), largest)
    tl.store(absmax + group, largest, mask=group * GROUP < numel)


def accepts_quantize(weight: Tensor, quant_type: QuantType, group_size: int) -> bool:
    """Whether the kernel can take these arguments of quantize_groups."""
    return gpu.runs_here(weight) and quant_type in ("nf4", "fp4") and group_size >= 32


def quantize_groups(
    weight: Tensor, quant_type: QuantType, group_size: int
) -> tuple[Tensor, Tensor]:
    """quantize_groups for arguments that were accepted."""
    values, code_of_rank = codebook(quant_type).sort(stable=True)
    midpoints = ((values[:-1] + values[1:]) / 2).to(weight.device)
    numel = weight.numel()
    num_groups = -(-numel // group_size)
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(num_groups, dtype=torch.float32, device=weight.device)
    groups = max(1, 2048 // group_size)
    _quantize_kernel[(triton.cdiv(num_groups, groups),)](
        packed, absmax, weight.reshape(-1), midpoints, code_of_rank.int().to(weight.device),
        numel, SMALLEST_ABSMAX, GROUPS=groups, GROUP=group_size, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return packed, absmax
