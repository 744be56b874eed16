"""Gradients of the norm and of SiLU·up in Triton: one launch each, float32 inside, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import device as gpu
from kernels.gpu.lora import TRITON_DTYPES
from kernels.gpu.rows import MAX_SIZE, SILU_BLOCK, norm_warps


@triton.jit
def _norm_backward_kernel(out, x, weight, grad, size, eps, BLOCK: tl.constexpr):
    """Grid (num_rows); kernels/fused_backward.py has the formula."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    there = column < size
    value = tl.load(x + row + column, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(grad + row + column, mask=there, other=0.0).to(tl.float32)
    slope *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    normal = value * factor
    mean = tl.sum(slope * normal, 0) / size
    tl.store(out + row + column, ((slope - normal * mean) * factor).to(DTYPE), mask=there)


@triton.jit
def _silu_backward_kernel(out, gate_up, grad, size, BLOCK: tl.constexpr):
    """Grid (num_tokens, stretches)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    at = row * 2 * size + column
    gate = tl.load(gate_up + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + size, mask=there, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * size + column, mask=there, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    of_gate = slope * up * sigmoid * (1.0 + gate - silu)
    tl.store(out + at, of_gate.to(DTYPE), mask=there)
    tl.store(out + at + size, (slope * silu).to(DTYPE), mask=there)


def accepts_rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> bool:  # noqa: ARG001
    """Whether the kernel can take these arguments of rms_norm_backward."""
    is_plain = x.is_contiguous() and grad.is_contiguous() and weight.is_contiguous()
    fits = 0 < x.shape[-1] <= MAX_SIZE
    return gpu.runs_here(x, weight, grad) and x.dtype in TRITON_DTYPES and is_plain and fits


def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
    """rms_norm_backward for arguments that were accepted."""
    out, size = torch.empty_like(x), x.shape[-1]
    if out.numel():
        block = triton.next_power_of_2(size)
        _norm_backward_kernel[(x.numel() // size,)](
            out, x, weight, grad, size, eps, BLOCK=block, num_warps=norm_warps(block)
        )
    return out


def accepts_silu_and_mul_backward(gate_up: Tensor, grad: Tensor) -> bool:
    """Whether the kernel can take these arguments of silu_and_mul_backward."""
    is_plain = gate_up.dim() == 2 and gate_up.is_contiguous() and grad.is_contiguous()
    return gpu.runs_here(gate_up, grad) and gate_up.dtype in TRITON_DTYPES and is_plain


def silu_and_mul_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """silu_and_mul_backward for arguments that were accepted."""
    out = torch.empty_like(gate_up)
    num_tokens, size = grad.shape
    if out.numel():
        _silu_backward_kernel[(num_tokens, triton.cdiv(size, SILU_BLOCK))](
            out, gate_up, grad, size, BLOCK=SILU_BLOCK
        )
    return out
