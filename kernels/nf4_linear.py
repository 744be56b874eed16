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
from kernels.nf4 import FLOAT_DTYPES, QuantizedWeight, dequantize_4bit_reference


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
    """nf4_linear in plain PyTorch: one weight at a time is expanded, multiplied and dropped."""
    outs = [
        linear_reference(x, dequantize_4bit_reference(weight, x.dtype), bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def prepare_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight as nf4_linear reads it fastest here, to be kept instead of the one given."""
    return dispatch("prepare_weight", prepare_weight_reference, weight)


def prepare_weight_reference(weight: QuantizedWeight) -> QuantizedWeight:
    """prepare_weight for the references: the weight itself."""
    return weight
