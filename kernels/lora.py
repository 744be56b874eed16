"""Low-rank updates for a batch in which every token names its own adapter.

Numerics follow peft: the input is cast to A's dtype, both products are taken in it, then scaled and added to y.
Both products run in token tiles as in kernels/linear.py, over each adapter's own rank, so that an adapter's result does
not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.linear import linear_reference


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """The adapters of one linear layer, which writes columns start:stop of y."""

    start: int
    stop: int
    rows: Sequence[tuple[Tensor, Tensor] | None]
    """By lora index: (a [rank, in_features], b [stop - start, rank], alpha/r folded into b), one dtype; None: no update."""


def add_lora(y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor) -> None:
    """Add each token's low-rank update to y in place.

    Args:
        y:            [num_tokens, features], the layer's output.
        x:            [num_tokens, in_features], the layer's input.
        lora_indices: int32 [num_tokens], index into every slice's rows; -1 = base model.
        lora_scales:  float32 [num_tokens], multiplies the update.

    Raises:
        ValueError: shapes disagree.
    """
    num_tokens = len(x)
    check(len(y) == num_tokens, "y.shape[0]", num_tokens, len(y))
    check(lora_indices.shape == (num_tokens,), "lora_indices.shape", (num_tokens,), tuple(lora_indices.shape))
    check(lora_scales.shape == (num_tokens,), "lora_scales.shape", (num_tokens,), tuple(lora_scales.shape))
    for s in slices:
        check(0 <= s.start < s.stop <= y.shape[1], "slice", f"columns within 0:{y.shape[1]}", f"{s.start}:{s.stop}")
    dispatch("add_lora", add_lora_reference, y, x, slices, lora_indices, lora_scales)


def add_lora_reference(y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor) -> None:
    """add_lora in plain PyTorch: adapter by adapter, its tokens gathered."""
    for index in lora_indices.unique().tolist():
        if index < 0:
            continue
        tokens = (lora_indices == index).nonzero().squeeze(1)
        chosen, scales = x[tokens], lora_scales[tokens, None]
        for s in slices:
            row = s.rows[index]
            if row is None:
                continue
            a, b = row
            delta = linear_reference(linear_reference(chosen.to(a.dtype), a, None), b, None)
            y[tokens, s.start : s.stop] += (delta * scales).to(y.dtype)
