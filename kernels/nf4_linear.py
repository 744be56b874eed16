"""Projection with 4-bit weights: y = x W^T + bias, the slices of a fused projection in one call.

Numerics: each weight is dequantised in float32 and rounded once to x's dtype, as bitsandbytes does;
then as in kernels/linear.py, and as batch-invariant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.linear import check_bias, linear_reference
from kernels.nf4 import FLOAT_DTYPES, QuantizedWeight, expand_into


def nf4_linear(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """Multiply tokens with the weights (q|k|v or gate|up), results side by side.

    Args:
        x:       float32, bfloat16 or float16 [num_tokens, in_features].
        weights: NF4 or FP4, shape (out_i, in_features) each.
        biases:  one per weight: x's dtype [out_i], or None.

    Returns:
        x's dtype [num_tokens, sum(out_i)].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(len(weights) > 0, "weights", "at least one", 0)
    check(len(biases) == len(weights), "len(biases)", len(weights), len(biases))
    check(x.dim() == 2, "x.dim()", 2, x.dim())
    check(x.dtype in FLOAT_DTYPES, "x.dtype", FLOAT_DTYPES, x.dtype)
    for weight, bias in zip(weights, biases, strict=True):
        out_features, in_features = weight.shape
        check(x.shape[1] == in_features, "x.shape[1]", in_features, x.shape[1])
        if bias is not None:
            check_bias(bias, x, out_features)
    return dispatch("nf4_linear", nf4_linear_reference, x, weights, biases)


def nf4_linear_reference(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear in plain PyTorch: all weights are expanded into one, for the time of the call."""
    widths = [weight.shape[0] for weight in weights]
    dense = x.new_empty(sum(widths), x.shape[1])
    for rows, weight in zip(torch.split(dense, widths), weights, strict=True):
        expand_into(rows, weight)
    if all(bias is None for bias in biases):
        return linear_reference(x, dense, None)
    parts = [
        x.new_zeros(width) if bias is None else bias
        for width, bias in zip(widths, biases, strict=True)
    ]
    return linear_reference(x, dense, torch.cat(parts))


def prepare_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight as nf4_linear reads it fastest here, to be kept instead of the one given."""
    return dispatch("prepare_weight", prepare_weight_reference, weight)


def prepare_weight_reference(weight: QuantizedWeight) -> QuantizedWeight:
    """prepare_weight for the references: the weight itself."""
    return weight
