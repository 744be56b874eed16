"""Causal attention over short rows on a CPU, with its whole matrix of probabilities.

On CPUs the backward pass of PyTorch's fused attention is slow where rows are short: at 4 x 64
tokens in bfloat16 it takes ten times as long as these few batched products, at 2 x 256 three times.
Scores and softmax are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LENGTH = 256
"""Longer rows' probabilities would take more memory than they save time."""


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend.

    Args:
        q, k, v: [n, length, head_dim], one dtype.
        mask:    float32 [length, length], added to the scores.

    Returns:
        [n, length, head_dim].
    """
    result: Tensor = _ShortAttention.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return result


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)
        probabilities = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probabilities)
        return torch.bmm(probabilities, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
        slopes = torch.bmm(grad, v.transpose(1, 2)).float()  # of the probabilities
        of_scores = torch._softmax_backward_data(slopes, probabilities.float(), -1, torch.float32)
        of_scores = of_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), grad_v, None
