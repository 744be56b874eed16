"""The order of a 4-bit weight's codes in memory: the checkpoint's, or one made for reading.

stock        bitsandbytes': row after row, the first of two elements in a byte's high half.
interleaved  Rows in groups of 8, the last group may have fewer. For each block of 64 columns, 32
             bytes of each row of the group; byte i has element i of the block in its low half and
             element i + 32 in its high half. A group is one stream in the order in which 8 rows are
             multiplied, and a look-up of the low halves gives neighbours.
Both take the same memory, and either can be made from the other.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch

Layout = Literal["stock", "interleaved"]
ROWS = 8
BLOCK = 64


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
    rows, blocks = shape[0], shape[1] // BLOCK
    full = rows // ROWS * ROWS
    groups = [(0, full, ROWS)] if full else []
    groups += [(full, rows, rows - full)] if full < rows else []
    out = torch.empty_like(packed)
    for first, stop, size in groups:
        span = slice(first * shape[1] // 2, stop * shape[1] // 2)
        if layout == "interleaved":
            pairs = packed[span].view(-1, size, blocks, BLOCK // 2)
            codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(-2)
            halves = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
            out[span] = halves.transpose(1, 2).flatten()
        else:
            halves = packed[span].view(-1, blocks, size, BLOCK // 2).transpose(1, 2)
            codes = torch.cat((halves & 15, halves >> 4), dim=-1)
            out[span] = (codes[..., 0::2] << 4 | codes[..., 1::2]).flatten()
    return out
