"""Low-rank updates for a batch in which every token names its own adapter.

Numerics follow peft: the input is cast to the adapter's dtype and both products are taken in it,
the scaled update is added to y in float32 and the sum rounded once. Products run in token tiles
(kernels/linear.py) over each adapter's own rank, so that an adapter's result depends on nothing
else in the batch, neither other tokens nor other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.linear import linear_reference


@dataclass(frozen=True, slots=True)
class LoraSlice:
    """What the adapters do to columns start:stop of a layer's output. Checked when made."""

    start: int
    stop: int
    rows: Sequence[tuple[Tensor, Tensor] | None]
    """By lora index: a [rank, in_features] and b [stop - start, rank] of one dtype, alpha/r folded
    into b; None: the adapter leaves these columns alone. On a CPU b is best a transposed view
    of [rank, stop - start], the order in which it is read."""

    def __post_init__(self) -> None:
        width = self.stop - self.start
        check(self.start >= 0 and width > 0, "slice", "0 <= start < stop", (self.start, self.stop))
        for row in self.rows:
            if row is not None:
                a, b = row
                check(a.dim() == 2, "a.dim()", 2, a.dim())
                shape = (width, a.shape[0])
                check(b.shape == shape, "b.shape", shape, tuple(b.shape))
                check(b.dtype == a.dtype, "b.dtype", a.dtype, b.dtype)


def add_lora(
    y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor
) -> None:
    """Add each token's low-rank update to y in place.

    Args:
        y:            [num_tokens, features], the layer's output.
        x:            [num_tokens, in_features], the layer's input.
        slices:       the parts of y that adapters change.
        lora_indices: int32 [num_tokens], index into every slice's rows; -1 = base model.
        lora_scales:  float32 [num_tokens], multiplies the update.

    Raises:
        ValueError: shapes disagree.
    """
    num_tokens = len(x)
    check(len(y) == num_tokens, "y.shape[0]", num_tokens, len(y))
    check(len(lora_indices) == num_tokens, "len(lora_indices)", num_tokens, len(lora_indices))
    check(len(lora_scales) == num_tokens, "len(lora_scales)", num_tokens, len(lora_scales))
    for part in slices:
        check(part.stop <= y.shape[1], "slice.stop", f"at most {y.shape[1]}", part.stop)
    dispatch("add_lora", add_lora_reference, y, x, slices, lora_indices, lora_scales)


def add_lora_reference(
    y: Tensor, x: Tensor, slices: Sequence[LoraSlice], lora_indices: Tensor, lora_scales: Tensor
) -> None:
    """add_lora in plain PyTorch: adapter by adapter, its tokens gathered."""
    indices = lora_indices.tolist()
    present = set(indices)
    for index in sorted(present - {-1}):
        # A batch of one adapter, every prompt chunk and single request, needs no gathering.
        tokens = slice(None) if len(present) == 1 else (lora_indices == index).nonzero().squeeze(1)
        chosen, scales = x[tokens], lora_scales[tokens, None]
        for part in slices:
            row = part.rows[index]
            if row is None:
                continue
            a, b = row
            update = linear_reference(linear_reference(chosen.to(a.dtype), a, None), b, None)
            columns = slice(part.start, part.stop)
            y[tokens, columns] = (y[tokens, columns] + update * scales).to(y.dtype)
