"""Projection with 8-bit weights, for the output head: y = (x Q^T) * scales + bias.

Numerics: each row of the weight is scaled to a largest magnitude of 127 and rounded to whole
numbers, which every float type holds exactly; the sums are float32, scaled once per row and rounded
once to x's dtype. Batch-invariant as kernels/linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.linear import check_bias, linear_reference
from kernels.nf4 import FLOAT_DTYPES

LARGEST_CODE = 127
ROWS = 4096
"""Rows of the weight that the reference expands at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """An 8-bit weight matrix, a scale per row. Making one whose fields disagree raises
    ValueError."""

    codes: Tensor
    """int8 [out_features, in_features], contiguous."""
    scales: Tensor
    """float32 [out_features]: the weight is codes * scales[:, None]."""
    dtype: torch.dtype
    """The original weight's."""

    def __post_init__(self) -> None:
        check(self.codes.dtype == torch.int8, "codes.dtype", torch.int8, self.codes.dtype)
        check(self.codes.dim() == 2, "codes.dim()", 2, self.codes.dim())
        check(self.codes.is_contiguous(), "codes.stride()", "contiguous", self.codes.stride())
        size = (self.codes.shape[0],)
        check(self.scales.shape == size, "scales.shape", size, tuple(self.scales.shape))
        is_float32 = self.scales.dtype == torch.float32
        check(is_float32, "scales.dtype", torch.float32, self.scales.dtype)
        check(self.dtype in FLOAT_DTYPES, "dtype", FLOAT_DTYPES, self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantize_int8(weight: Tensor) -> Int8Weight:
    """Round a weight [out_features, in_features] to 8 bits, row by row.

    Raises:
        ValueError: it is no matrix of floats, or a value is NaN or infinite.
    """
    check(weight.dim() == 2, "weight.dim()", 2, weight.dim())
    check(weight.dtype in FLOAT_DTYPES, "weight.dtype", FLOAT_DTYPES, weight.dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], ROWS):
        rows = weight[start : start + ROWS].float()
        scale = rows.abs().amax(dim=1) / LARGEST_CODE
        check(bool(scale.isfinite().all()), "weight", "finite values", "NaN or infinity")
        divisor = torch.where(scale > 0, scale, 1.0)  # a row of zeros gives zeros
        codes[start : start + ROWS] = (rows / divisor[:, None]).round_()
        scales[start : start + ROWS] = scale
    return Int8Weight(codes=codes, scales=scales, dtype=weight.dtype)


def dequantize_int8(weight: Int8Weight) -> Tensor:
    """The weight in its original dtype, rounded once."""
    return (weight.codes * weight.scales[:, None]).to(weight.dtype)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Multiply tokens with an 8-bit weight.

    Args:
        x:      float32, bfloat16 or float16 [num_tokens, in_features].
        weight: of shape (out_features, in_features).
        bias:   x's dtype [out_features].

    Returns:
        x's dtype [num_tokens, out_features].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(x.dim() == 2, "x.dim()", 2, x.dim())
    check(x.dtype in FLOAT_DTYPES, "x.dtype", FLOAT_DTYPES, x.dtype)
    check(x.shape[1] == weight.shape[1], "x.shape[1]", weight.shape[1], x.shape[1])
    if bias is not None:
        check_bias(bias, x, weight.shape[0])
    return dispatch("int8_linear", int8_linear_reference, x, weight, bias)


def int8_linear_reference(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """int8_linear in plain PyTorch: some rows of the weight at a time, in float32."""
    x32 = x.float()
    y = x.new_empty(len(x), weight.shape[0])
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        sums = linear_reference(x32, weight.codes[rows].float(), None) * weight.scales[rows]
        y[:, rows] = sums if bias is None else sums + bias[rows].float()
    return y
