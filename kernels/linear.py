"""Dense projection y = x W^T + bias, batch-invariant: a token has the same bits in any company.

Every product multiplies a tile of TOKEN_TILE rows, the last padded with zeros: one shape per
weight, hence one order of summation. (With torch 2.13 on a CPU float32 rows do change with their
number, below five; bfloat16 and float16 rows were not seen to.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import TOKEN_TILE, check, dispatch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply tokens with a dense weight.

    Args:
        x:      float32, bfloat16 or float16 [num_tokens, in_features].
        weight: x's dtype [out_features, in_features].
        bias:   x's dtype [out_features].

    Returns:
        x's dtype [num_tokens, out_features].

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(weight.dim() == 2, "weight.dim()", 2, weight.dim())
    check(x.dim() == 2, "x.dim()", 2, x.dim())
    check(x.shape[1] == weight.shape[1], "x.shape[1]", weight.shape[1], x.shape[1])
    check(x.dtype == weight.dtype, "x.dtype", weight.dtype, x.dtype)
    if bias is not None:
        check_bias(bias, x, weight.shape[0])
    return dispatch("linear", linear_reference, x, weight, bias)


def check_bias(bias: Tensor, x: Tensor, out_features: int) -> None:
    """Refuse a bias that does not fit x and its weight."""
    check(bias.shape == (out_features,), "bias.shape", (out_features,), tuple(bias.shape))
    check(bias.dtype == x.dtype, "bias.dtype", x.dtype, bias.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear in plain PyTorch."""
    if x.dtype == torch.float32 and x.shape[1] % 4:
        # MKL's float32 product of such widths depends on a row's place in the tile.
        padding = (0, -x.shape[1] % 4)
        x, weight = functional.pad(x, padding), functional.pad(weight, padding)
    num_tokens = len(x)
    missing = -num_tokens % TOKEN_TILE
    padded = functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    if len(padded) == TOKEN_TILE:
        return functional.linear(padded, weight, bias)[:num_tokens]
    out = x.new_empty(len(padded), weight.shape[0])
    for start in range(0, len(padded), TOKEN_TILE):
        tile = slice(start, start + TOKEN_TILE)
        out[tile] = functional.linear(padded[tile], weight, bias)
    return out[:num_tokens]
