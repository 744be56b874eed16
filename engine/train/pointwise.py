"""Norm, rotary embedding and SiLU·up, as autograd sees them.

Gradients go to activations only; the base's norms are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import fused, fused_backward


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """kernels/fused.py's rms_norm."""
    result: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """kernels/fused.py's apply_rotary."""
    result: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return result


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """kernels/fused.py's silu_and_mul."""
    result: Tensor = _SiluAndMul.apply(gate_up)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        return fused.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        return fused_backward.rms_norm_backward(x, ctx.weight, grad, ctx.eps), None, None


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.cos, ctx.sin = cos, sin
        return fused.apply_rotary(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = (grad.contiguous() for grad in grads)
        return *fused.apply_rotary(grad_q, grad_k, ctx.cos, -ctx.sin), None, None


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return fused.silu_and_mul(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return fused_backward.silu_and_mul_backward(gate_up, grads[0].contiguous())
