"""A frozen projection with its low-rank updates, as autograd sees it.

Forward    y = x W^T + bias + scaling * (dropout(x) a^T) b^T, for each slice its own a and b.
Backward   x gets a gradient; those of a and b are added to the adapter's float32 buffers at once.
The base's tensors are never saved by autograd, which refuses those made in inference mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.layers import FusedLinear, LinearSlice
from engine.train.noise import dropout_mask, noise_seed
from engine.train.updates import Update, Updates
from kernels.int8_linear import ROWS, Int8Weight
from kernels.nf4 import QuantizedWeight
from kernels.nf4_autograd import nf4_linear_backward


def project(x: Tensor, projection: FusedLinear, updates: Updates) -> Tensor:
    """x [num_tokens, in_features] -> [num_tokens, sum of out_features].

    Slices that share their input share its dropout mask.
    """
    found = updates.of(projection, x.dtype)
    mask = None
    if found and updates.dropout:
        seed = noise_seed(updates.seed, projection.paths[0])
        mask = dropout_mask(x, updates.dropout, seed)
    result: Tensor = _Projection.apply(x, projection, found, mask, updates.grad_scale)  # type: ignore[no-untyped-call]
    return result


class _Projection(torch.autograd.Function):
    """Keeps its input and the dropout mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: FusedLinear,
        updates: tuple[Update, ...],
        mask: Tensor | None,
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.projection, ctx.updates, ctx.grad_scale = projection, updates, grad_scale
        y = projection(x, None)
        dropped = x if mask is None else x * mask
        for update in updates:
            low = dropped @ update.a.t()  # [num_tokens, rank]
            y[:, update.start : update.stop].addmm_(low, update.b.t(), alpha=update.scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = projection_backward(grad, ctx.projection)
        dropped = x if mask is None else x * mask
        grad_dropped = grad_x if mask is None else torch.zeros_like(grad_x)
        for update in ctx.updates:
            part = grad[:, update.start : update.stop]
            grad_low = part @ update.b  # [num_tokens, rank]
            if update.a_grad is not None and update.b_grad is not None:
                scale = update.scaling * ctx.grad_scale
                low = dropped @ update.a.t()
                update.b_grad.add_(part.t() @ low, alpha=scale)
                update.a_grad.add_(grad_low.t() @ dropped, alpha=scale)
            grad_dropped.addmm_(grad_low, update.a, alpha=update.scaling)
        if mask is not None:
            grad_x.addcmul_(grad_dropped, mask)
        return grad_x, None, None, None, None


def projection_backward(grad: Tensor, projection: FusedLinear) -> Tensor:
    """The gradient of a frozen projection's input: grad [num_tokens, sum of out_features] times
    its weights.
    """
    if projection.weight is not None:
        return grad @ projection.weight
    if projection.weights and len(projection.weights) == len(projection.slices):
        return nf4_linear_backward(grad, projection.weights)
    parts = torch.split(grad, [part.out_features for part in projection.slices], dim=1)
    products = [
        _slice_backward(part_grad, part)
        for part_grad, part in zip(parts, projection.slices, strict=True)
    ]
    return torch.stack(products).sum(0) if len(products) > 1 else products[0]


def _slice_backward(grad: Tensor, part: LinearSlice) -> Tensor:
    weight = part.weight
    assert weight is not None, part.path
    if isinstance(weight, QuantizedWeight):
        return nf4_linear_backward(grad.contiguous(), [weight])
    if isinstance(weight, Int8Weight):
        return _int8_backward(grad, weight)
    return grad @ weight


def _int8_backward(grad: Tensor, weight: Int8Weight) -> Tensor:
    """Some rows of the weight at a time, in float32."""
    result = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        result.addmm_(grad[:, rows].float() * weight.scales[rows], weight.codes[rows].float())
    return result.to(grad.dtype)
