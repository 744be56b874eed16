"""Projection with 4-bit weights: y = x W^T + bias for the slices of a fused projection (q|k|v, gate|up) in one call.

Numerics: each weight is dequantised in float32 and rounded once to x's dtype, as bitsandbytes does; then as kernels/linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.linear import linear_reference
from kernels.nf4 import QuantizedWeight, dequantize_4bit


def nf4_linear(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """Multiply tokens with the weights, results side by side.

    Args:
        x:       float32, bfloat16 or float16 [num_tokens, in_features].
        weights: NF4 or FP4, shape (out_i, in_features) each.
        biases:  one per weight, x's dtype [out_i], or None.

    Returns:
        x's dtype [num_tokens, sum(out_i)].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(len(weights) > 0, "weights", "at least one", 0)
    check(len(biases) == len(weights), "biases", f"{len(weights)}, one per weight", len(biases))
    for weight, bias in zip(weights, biases, strict=True):
        out_features, in_features = weight.shape
        check(x.dim() == 2 and x.shape[1] == in_features, "x.shape", ("num_tokens", in_features), tuple(x.shape))
        if bias is not None:
            check(bias.shape == (out_features,), "bias.shape", (out_features,), tuple(bias.shape))
            check(bias.dtype == x.dtype, "bias.dtype", x.dtype, bias.dtype)
    return dispatch("nf4_linear", nf4_linear_reference, x, weights, biases)


def nf4_linear_reference(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """nf4_linear in plain PyTorch: one weight at a time is expanded, multiplied and dropped."""
    outs = [
        linear_reference(x, dequantize_4bit(weight, x.dtype), bias) for weight, bias in zip(weights, biases, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
