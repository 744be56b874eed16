"""Norms and SiLU·up in Triton: one launch each, rounding where the references round.

A program takes a row (SiLU: a stretch of one), so that no row's bits depend on the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import device as gpu
from kernels.gpu.lora import TRITON_DTYPES

MAX_SIZE = 1 << 15
"""Elements of a row that is normalised: its program holds them all in registers."""
SILU_BLOCK = 1024


@triton.jit
def _norm_kernel(
    out, total, x, residual, weight, size, eps, x_stride, residual_stride,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows). With a residual the sum is stored in total, and normalised."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < size
    value = tl.load(x + row * x_stride + column, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * residual_stride + column, mask=there, other=0.0)
        value = (value + before.to(tl.float32)).to(DTYPE)
        tl.store(total + row * size + column, value, mask=there)
        value = value.to(tl.float32)
    mean_square = tl.sum(value * value, 0) / size
    value = (value * tl.rsqrt(mean_square + eps)).to(DTYPE).to(tl.float32)
    value *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, value.to(DTYPE), mask=there)


@triton.jit
def _silu_kernel(out, gate_up, size, stride, BLOCK: tl.constexpr):
    """Grid (num_tokens, stretches)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=there, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    tl.store(out + row * size + column, (gate * up).to(DTYPE), mask=there)


def accepts_rms_norm(x: Tensor, weight: Tensor, eps: float) -> bool:  # noqa: ARG001
    """Whether the kernel can take these arguments of rms_norm."""
    return (
        gpu.runs_here(x, weight)
        and x.dtype in TRITON_DTYPES
        and 0 < x.shape[-1] <= MAX_SIZE
        and (x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1))
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm for arguments that were accepted."""
    return _norm(x, None, weight, eps)[0]


def accepts_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> bool:
    """Whether the kernel can take these arguments of add_rms_norm."""
    return (
        gpu.runs_here(x, residual)
        and accepts_rms_norm(x, weight, eps)
        and x.dim() == 2
        and residual.stride(1) == 1
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """add_rms_norm for arguments that were accepted."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    num_rows = x.numel() // size
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if num_rows:
        block = triton.next_power_of_2(size)
        stride = x.stride(0) if x.dim() == 2 else size
        _norm_kernel[(num_rows,)](
            out, total, x, x if residual is None else residual, weight, size, eps, stride,
            stride if residual is None else residual.stride(0),
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=norm_warps(block),
        )  # fmt: skip
    return out, total


def norm_warps(block: int) -> int:
    """Warps of a program for rows of so many elements: 16 a thread, up to 16 warps."""
    return min(16, max(1, block // 512))


def accepts_silu_and_mul(gate_up: Tensor) -> bool:
    """Whether the kernel can take this argument of silu_and_mul."""
    is_plain = gate_up.dim() == 2 and gate_up.stride(1) == 1
    return gpu.runs_here(gate_up) and gate_up.dtype in TRITON_DTYPES and is_plain


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu_and_mul for an argument that was accepted."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _silu_kernel[(num_tokens, triton.cdiv(size, SILU_BLOCK))](
            out, gate_up, size, gate_up.stride(0), BLOCK=SILU_BLOCK
        )
    return out
