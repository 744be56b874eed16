"""Projection with 4-bit weights: y = x W^T + bias, the slices of a fused projection in one call.

Numerics: each weight is dequantised in float32 and rounded once to x's dtype, as bitsandbytes does;
then as in kernels/linear.py, and as batch-invariant. Kernels may round less: the table's values,
and multiply the scales into sums.

With int8_activations 64 columns of x share a scale, their largest magnitude over 127, and are
rounded to multiples of it; the table's values are rounded to multiples of 1/127. Sums over such a
block are exact, those over blocks float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.codebooks import codebook
from kernels.dispatch import check, dispatch
from kernels.fused import silu_and_mul
from kernels.linear import check_bias, linear_reference
from kernels.nf4 import FLOAT_DTYPES, QuantizedWeight, decode_absmax, expand_into

INT8_BLOCK = 64
"""Columns of x that share a scale where it is rounded to 8 bits."""


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
    if torch.compiler.is_compiling():
        from kernels.torch_ops import traced_nf4_linear  # which is made of this function

        return traced_nf4_linear(x, weights, biases)
    _check(x, weights, biases)
    return dispatch("nf4_linear", nf4_linear_reference, x, weights, biases)


def _check(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> None:
    check(len(weights) > 0, "weights", "at least one", 0)
    check(len(biases) == len(weights), "len(biases)", len(weights), len(biases))
    check(x.dim() == 2, "x.dim()", 2, x.dim())
    check(x.dtype in FLOAT_DTYPES, "x.dtype", FLOAT_DTYPES, x.dtype)
    for weight, bias in zip(weights, biases, strict=True):
        out_features, in_features = weight.shape
        check(x.shape[1] == in_features, "x.shape[1]", in_features, x.shape[1])
        if bias is not None:
            check_bias(bias, x, out_features)


def has_int8_activations() -> bool:
    """Whether this machine has a kernel for weights with int8_activations."""
    return dispatch("has_int8_activations", lambda: False)


def takes_int8_activations(weight: QuantizedWeight) -> bool:
    """Whether a weight's groups are whole blocks of a row, as 8-bit activations need."""
    return weight.group_size % INT8_BLOCK == 0 and weight.shape[1] % weight.group_size == 0


def nf4_linear_reference(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear in plain PyTorch: all weights are expanded into one, for the time of the call."""
    if any(weight.int8_activations for weight in weights):
        parts = [
            _linear_of_bytes(x, weight, bias)
            if weight.int8_activations
            else nf4_linear_reference(x, [weight], [bias])
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return torch.cat(parts, dim=1)
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


def _linear_of_bytes(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x W^T + bias with 8-bit activations: x's dtype [num_tokens, out_features]."""
    check(takes_int8_activations(weight), "weight", "groups of whole blocks", weight.shape)
    scales = decode_absmax(weight).view(weight.shape[0], -1)
    scales = scales.repeat_interleave(weight.group_size // INT8_BLOCK, dim=1)
    packed = weight.in_layout("stock").packed.int()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(weight.shape[0], -1)
    steps = (codebook(weight.quant_type).to(x.device) * 127).round()[codes]
    blocks = x.float().view(len(x), -1, INT8_BLOCK)
    largest = blocks.abs().amax(dim=2, keepdim=True)
    rounded = (blocks * (127 / largest).nan_to_num(0.0, posinf=0.0)).round()
    total = x.new_zeros(len(x), weight.shape[0], dtype=torch.float32)
    for b, columns in enumerate(steps.view(weight.shape[0], -1, INT8_BLOCK).unbind(dim=1)):
        total += rounded[:, b] @ columns.t() * (largest[:, b] / 127**2) * scales[:, b]
    return (total if bias is None else total + bias).to(x.dtype)


def prepare_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight as nf4_linear reads it fastest here, to be kept instead of the one given."""
    return dispatch("prepare_weight", prepare_weight_reference, weight)


def prepare_weight_reference(weight: QuantizedWeight) -> QuantizedWeight:
    """prepare_weight for the references: the weight itself."""
    return weight


def nf4_linear_add(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], residual: Tensor
) -> Tensor:
    """nf4_linear, then the residual stream is added to its rounded result.

    Args:
        x, weights, biases: as nf4_linear's.
        residual: x's dtype [num_tokens, sum(out_i)].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    _check(x, weights, biases)
    shape = (len(x), sum(weight.shape[0] for weight in weights))
    check(residual.shape == shape, "residual.shape", shape, tuple(residual.shape))
    check(residual.dtype == x.dtype, "residual.dtype", x.dtype, residual.dtype)
    return dispatch("nf4_linear_add", _add_separately, x, weights, biases, residual)


def _add_separately(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], residual: Tensor
) -> Tensor:
    """nf4_linear_add in plain PyTorch, but for the product, which is dispatched."""
    return residual + nf4_linear(x, weights, biases)


def nf4_linear_silu(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """silu_and_mul of nf4_linear: SiLU of the gate's product times the up's.

    Args:
        x:       as nf4_linear's.
        weights: gate and up, of one shape.
        biases:  one per weight.

    Returns:
        x's dtype [num_tokens, out_features].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    _check(x, weights, biases)
    shapes = [weight.shape for weight in weights]
    check(len(shapes) == 2 and shapes[0] == shapes[1], "weights", "two of one shape", shapes)
    return dispatch("nf4_linear_silu", _silu_separately, x, weights, biases)


def _silu_separately(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear_silu in plain PyTorch, but for the product, which is dispatched."""
    return silu_and_mul(nf4_linear(x, weights, biases))
