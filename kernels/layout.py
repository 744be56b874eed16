"""The order of a 4-bit weight's codes in memory: the checkpoint's, or one made for reading.

stock        bitsandbytes': row after row, the first of two elements in a byte's high half.
interleaved  Rows in groups of 32, the last group may have fewer. A row's codes for 8 columns are a
             word of 32 bits: column 2 j in bits 4 j .. 4 j + 3, column 2 j + 1 sixteen bits above.
             For every 8 columns follow the words of the group's rows, so that a vector register
             has a row in each lane, and a look-up of 16-bit halves gives neighbours.
Both take the same memory, and either can be made from the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch

Layout = Literal["stock", "interleaved"]
ROWS = 32
BLOCK = 64
"""Columns of which in_features is a multiple: those that share a scale at the least."""


def relayout(packed: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
    """Bring codes into the other layout.

    Args:
        packed: uint8 [numel / 2], in the layout that is not asked for.
        shape:  (out_features, in_features); in_features is a multiple of 64.
        layout: the one to make.

    Returns:
        uint8 [numel / 2], new memory.

    Raises:
        ValueError: sizes or the layout make no sense.
    """
    check(layout in ("stock", "interleaved"), "layout", "stock or interleaved", layout)
    check(shape[1] % BLOCK == 0, "shape[1]", f"a multiple of {BLOCK}", shape[1])
    size = (shape[0] * shape[1] // 2,)
    check(packed.shape == size, "packed.shape", size, tuple(packed.shape))
    return dispatch("relayout", relayout_reference, packed, shape, layout)


def relayout_reference(packed: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
    """relayout in plain PyTorch."""
    rows, words = shape[0], shape[1] // 8
    full = rows // ROWS * ROWS
    groups = [(0, full, ROWS)] if full else []
    groups += [(full, rows, rows - full)] if full < rows else []
    out = torch.empty_like(packed)
    for first, stop, size in groups:
        span = slice(first * shape[1] // 2, stop * shape[1] // 2)
        if layout == "interleaved":
            pairs = packed[span].view(-1, size, words, 4)
            halves = torch.cat((pairs >> 4, pairs & 15), dim=-1)  # even columns, then odd ones
            codes = halves[..., 0::2] | halves[..., 1::2] << 4
            out[span] = codes.transpose(1, 2).flatten()
        else:
            codes = packed[span].view(-1, words, size, 4).transpose(1, 2)
            halves = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
            out[span] = (halves[..., :4] << 4 | halves[..., 4:]).flatten()
    return out
