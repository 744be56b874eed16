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
from engine.train.updates import ProjectionUpdate, Updates
from kernels.int8_linear import ROWS, Int8Weight
from kernels.nf4 import QuantizedWeight
from kernels.nf4_autograd import nf4_linear_backward, nf4_linear_training
from kernels.product import product


def project(x: Tensor, projection: FusedLinear, updates: Updates) -> Tensor:
    """x [num_tokens, in_features] -> [num_tokens, sum of out_features].

    Slices that share their input share its dropout mask.
    """
    update = updates.of(projection, x.dtype)
    mask = None
    if update is not None and updates.dropout:
        seed = noise_seed(updates.seed, projection.paths[0])
        mask = dropout_mask(x, updates.dropout, seed)
    result: Tensor = _Projection.apply(x, projection, update, mask, updates.grad_scale)  # type: ignore[no-untyped-call]
    return result


class _Projection(torch.autograd.Function):
    """Keeps its input, the dropout mask, and x a^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: FusedLinear,
        update: ProjectionUpdate | None,
        mask: Tensor | None,
        grad_scale: float,
    ) -> Tensor:
        ctx.projection, ctx.update, ctx.grad_scale = projection, update, grad_scale
        y = base_projection(x, projection)
        if update is not None:
            dropped = x if mask is None else x * mask
            low = product(dropped, update.a.t())  # [num_tokens, sum of ranks]
            for part in update.parts:
                columns = y[:, part.start : part.stop]
                columns.addmm_(low[:, part.rows], part.b.t(), alpha=update.scaling)
            ctx.save_for_backward(x, mask, low)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, update = grads[0].contiguous(), ctx.update
        grad_x = projection_backward(grad, ctx.projection)
        if update is not None:
            x, mask, low = ctx.saved_tensors
            grad_low = torch.empty_like(low)
            for part in update.parts:
                grad_low[:, part.rows] = product(grad[:, part.start : part.stop], part.b)
            _add_gradients(ctx, grad, x if mask is None else x * mask, low, grad_low)
            if mask is None:
                grad_x.addmm_(grad_low, update.a, alpha=update.scaling)
            else:
                grad_x.addcmul_(product(grad_low, update.a), mask, value=update.scaling)
        return grad_x, None, None, None, None


def _add_gradients(ctx: Any, grad: Tensor, dropped: Tensor, low: Tensor, grad_low: Tensor) -> None:
    """Add a's and b's gradients to the adapter's."""
    update = ctx.update
    scale = update.scaling * ctx.grad_scale
    of_a = None
    for part in update.parts:
        if part.a_grad is None or part.b_grad is None:
            continue
        if of_a is None:
            of_a = product(grad_low.t(), dropped)  # [sum of ranks, in_features]
        part.a_grad.add_(of_a[part.rows], alpha=scale)
        of_b = low[:, part.rows].t() @ grad[:, part.start : part.stop]  # b's transpose
        part.b_grad.add_(of_b.t(), alpha=scale)


def base_projection(x: Tensor, projection: FusedLinear) -> Tensor:
    """The frozen projection, [num_tokens, sum of out_features]."""
    if projection.weight is not None:
        y = product(x, projection.weight.t())
        return y if projection.bias is None else y.add_(projection.bias)
    if len(projection.weights) == len(projection.slices):
        return nf4_linear_training(x, projection.weights, projection.biases)
    return projection(x, None)


def projection_backward(grad: Tensor, projection: FusedLinear) -> Tensor:
    """The gradient of a frozen projection's input: grad [num_tokens, sum of out_features] times
    its weights.
    """
    if projection.weight is not None:
        return product(grad, projection.weight)
    if len(projection.weights) == len(projection.slices):
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
    return product(grad, weight)


def _int8_backward(grad: Tensor, weight: Int8Weight) -> Tensor:
    """Some rows of the weight at a time, in float32."""
    result = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        result.addmm_(grad[:, rows].float() * weight.scales[rows], weight.codes[rows].float())
    return result.to(grad.dtype)
