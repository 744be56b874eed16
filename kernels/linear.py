"""Dense projection y = x W^T + bias, batch-invariant: a token's result has the same bits alone or among any others.

Every product multiplies a tile of TOKEN_TILE rows, the last padded with zeros: one shape, so one order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    check(x.dim() == 2 and x.shape[1] == weight.shape[-1], "x.shape", ("num_tokens", weight.shape[-1]), tuple(x.shape))
    check(weight.dim() == 2, "weight.shape", "(out_features, in_features)", tuple(weight.shape))
    check(weight.dtype == x.dtype, "weight.dtype", x.dtype, weight.dtype)
    if bias is not None:
        check(bias.shape == (weight.shape[0],), "bias.shape", (weight.shape[0],), tuple(bias.shape))
        check(bias.dtype == x.dtype, "bias.dtype", x.dtype, bias.dtype)
    return dispatch("linear", linear_reference, x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear in plain PyTorch."""
    num_tokens = len(x)
    tiles = tile_tokens(x)
    if len(tiles) == 1:
        return torch.nn.functional.linear(tiles[0], weight, bias)[:num_tokens]
    out = torch.empty(len(tiles) * TOKEN_TILE, weight.shape[0], dtype=x.dtype, device=x.device)
    for tile, rows in zip(tiles, out.split(TOKEN_TILE), strict=True):
        rows.copy_(torch.nn.functional.linear(tile, weight, bias))
    return out[:num_tokens]


def tile_tokens(x: Tensor) -> tuple[Tensor, ...]:
    """Split [num_tokens, features] into contiguous tiles [TOKEN_TILE, features], the last padded with zeros."""
    padding = -len(x) % TOKEN_TILE
    padded = torch.nn.functional.pad(x, (0, 0, 0, padding)) if padding else x.contiguous()
    return padded.split(TOKEN_TILE)
