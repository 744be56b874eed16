"""Gradients of kernels/fused.py's norm and SiLU times up; a rotation's is the rotation back."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch


def rms_norm_backward(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
    """The gradient of rms_norm's x; weight is frozen.

    Args:
        x, weight, eps: as rms_norm took them.
        grad:           x's shape and dtype, the gradient of its result.

    Returns:
        x's shape and dtype; float32 arithmetic, rounded once.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(weight.shape == x.shape[-1:], "weight.shape", tuple(x.shape[-1:]), tuple(weight.shape))
    _check_like("grad", grad, x)
    return dispatch("rms_norm_backward", rms_norm_backward_reference, x, weight, grad, eps)


def rms_norm_backward_reference(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
    """rms_norm_backward in plain PyTorch. With n = x / rms(x) and g = grad * weight:
    (g - n * mean(g * n)) / rms(x).
    """
    x32 = x.float()
    factor = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    normal = x32 * factor
    slope = grad.float() * weight.float()
    mean = (slope * normal).mean(-1, keepdim=True)
    return ((slope - normal * mean) * factor).to(x.dtype)


def silu_and_mul_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient of silu_and_mul's argument.

    Args:
        gate_up: [num_tokens, 2 * size].
        grad:    gate_up's dtype [num_tokens, size].

    Returns:
        gate_up's shape and dtype; float32 arithmetic, rounded once.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(gate_up.shape[-1] % 2 == 0, "gate_up.shape[-1]", "an even number", gate_up.shape[-1])
    _check_like("grad", grad, gate_up[..., : gate_up.shape[-1] // 2])
    return dispatch("silu_and_mul_backward", silu_and_mul_backward_reference, gate_up, grad)


def silu_and_mul_backward_reference(gate_up: Tensor, grad: Tensor) -> Tensor:
    """silu_and_mul_backward in plain PyTorch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate - silu)  # of SiLU
    grad = grad.float()
    return torch.cat([grad * up * slope, grad * silu], dim=-1).to(gate_up.dtype)


def _check_like(name: str, tensor: Tensor, model: Tensor) -> None:
    check(tensor.shape == model.shape, f"{name}.shape", tuple(model.shape), tuple(tensor.shape))
    check(tensor.dtype == model.dtype, f"{name}.dtype", model.dtype, tensor.dtype)
