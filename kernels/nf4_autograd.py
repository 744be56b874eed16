"""Training through frozen 4-bit weights: nf4_linear with a gradient to x, and to nothing else.

dX = dY W. The weights are read as they are stored, row-major: no transposed copy. A training pass
has many tokens, whose bits may depend on their number, as those of serving may not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.nf4 import FLOAT_DTYPES, QuantizedWeight, expand_into
from kernels.nf4_linear import nf4_linear


def nf4_linear_trainable(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear that autograd sees through; biases get no gradient.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    result: Tensor = _Nf4Linear.apply(x, weights, biases)  # type: ignore[no-untyped-call]
    return result


class _Nf4Linear(torch.autograd.Function):
    """Keeps the weights, which are there anyway, and no activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Sequence[QuantizedWeight],
        biases: Sequence[Tensor | None],
    ) -> Tensor:
        ctx.weights = weights
        return nf4_linear_training(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        needed = ctx.needs_input_grad[0]
        return (nf4_linear_backward(grads[0], ctx.weights) if needed else None, None, None)


def nf4_linear_training(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear, the same arguments and result, as fast as may be for many tokens.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    return dispatch("nf4_linear_training", nf4_linear, x, weights, biases)


def nf4_linear_backward(grad: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
    """The gradient of x, given that of nf4_linear's result.

    Args:
        grad:    float32, bfloat16 or float16 [num_tokens, sum(out_i)].
        weights: shape (out_i, in_features) each.

    Returns:
        grad's dtype [num_tokens, in_features].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(len(weights) > 0, "weights", "at least one", 0)
    width = sum(weight.shape[0] for weight in weights)
    check(grad.dim() == 2, "grad.dim()", 2, grad.dim())
    check(grad.shape[1] == width, "grad.shape[1]", width, grad.shape[1])
    check(grad.dtype in FLOAT_DTYPES, "grad.dtype", FLOAT_DTYPES, grad.dtype)
    sizes = {weight.shape[1] for weight in weights}
    check(len(sizes) == 1, "in_features", "the same in all weights", sorted(sizes))
    return dispatch("nf4_linear_backward", nf4_linear_backward_reference, grad, weights)


def nf4_linear_backward_reference(grad: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
    """nf4_linear_backward in plain PyTorch."""
    widths = [weight.shape[0] for weight in weights]
    dense = grad.new_empty(sum(widths), weights[0].shape[1])
    for rows, weight in zip(torch.split(dense, widths), weights, strict=True):
        expand_into(rows, weight)
    return grad @ dense
