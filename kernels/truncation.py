"""Which tokens may be drawn: min_p, top_k and top_p as a least probability for each row.

Each rule keeps what is at least as likely as its last token, so equals are kept or dropped together
and no order among them matters. On the CPU numpy ranks single rows, some 20 times as fast as a
torch.sort of them all, and the native library finds top_p's another 10 times as fast; elsewhere the
references run, or what is registered for the operation. All give the same bits.
Public   truncate, sum_rows, sum_columns; truncate_reference, kth_largest_reference,
         nucleus_floors_reference
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import dispatch

NUM_MEMBERS = 128
"""Tokens that one of sum_columns' sums stands for; a power of two."""


def truncate(
    probs: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> None:
    """Steps 6 to 8: zero what may not be drawn, in place; draw's arguments."""
    dispatch("truncate", truncate_reference, probs, min_p, top_k, top_p)


def truncate_reference(
    probs: Tensor, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> None:
    """truncate with numpy on the CPU, in plain PyTorch elsewhere."""
    if min_p is not None or top_k is not None:
        _drop_below(probs, _floors(probs, min_p, top_k))
    if top_p is not None:
        _drop_below(probs, _nucleus_floors(probs, top_p))


def _drop_below(probs: Tensor, floors: Tensor) -> None:
    if probs.device.type == "cpu":  # numpy compares and multiplies 3 times as fast
        array = probs.numpy()
        np.multiply(array, array >= floors.numpy()[:, None], out=array)
    else:
        probs.mul_(probs >= floors[:, None])


def _floors(probs: Tensor, min_p: Tensor | None, top_k: Tensor | None) -> Tensor:
    """float32 [n]: the least probability that min_p and top_k let pass."""
    floors = probs.new_zeros(probs.shape[0])
    if min_p is not None:
        floors = probs.amax(dim=-1) * min_p
    if top_k is not None:
        has_k = (top_k > 0) & (top_k < probs.shape[1])
        kth = _kth_largest(probs, torch.where(has_k, top_k, 1))
        floors = torch.where(has_k, torch.maximum(floors, kth), floors)
    return floors


def _kth_largest(probs: Tensor, k: Tensor) -> Tensor:
    """float32 [n]: the k[i]-th largest of row i, k counting from 1."""
    if probs.device.type != "cpu":
        return kth_largest_reference(probs, k)
    places = (probs.shape[1] - k).tolist()
    rows = zip(probs.numpy(), places, strict=True)
    return torch.tensor([float(np.partition(row, place)[place]) for row, place in rows])


def kth_largest_reference(probs: Tensor, k: Tensor) -> Tensor:
    """The same result in plain PyTorch."""
    ranked = probs.topk(int(k.max()), dim=-1).values
    return ranked.gather(1, k[:, None] - 1).squeeze(1)


def _nucleus_floors(probs: Tensor, top_p: Tensor) -> Tensor:
    """float32 [n]: the least probability in the smallest set whose share is at least top_p."""
    if probs.device.type != "cpu":
        return nucleus_floors_reference(probs, top_p)
    return dispatch("nucleus_floors", _nucleus_floors_by_row, probs, top_p)


def nucleus_floors_reference(probs: Tensor, top_p: Tensor) -> Tensor:
    """The same result in plain PyTorch."""
    ranked = probs.sort(dim=-1, descending=True).values
    targets = top_p.double() * sum_rows(probs)
    is_short = ranked.cumsum(dim=-1, dtype=torch.float64) < targets[:, None]
    # Rounding may keep even the sum of all below its target: then all are kept.
    last = is_short.sum(dim=-1).clamp(max=probs.shape[1] - 1)
    floors = ranked.gather(1, last[:, None]).squeeze(1)
    return torch.where(top_p < 1.0, floors, 0.0)


def _nucleus_floors_by_row(probs: Tensor, top_p: Tensor) -> Tensor:
    rows = zip(probs.numpy(), sum_rows(probs).tolist(), top_p.tolist(), strict=True)
    return torch.tensor([_nucleus_floor(*row) for row in rows])


def _nucleus_floor(probs: np.ndarray, total: float, top_p: float) -> float:
    """One row; the same sums as the reference's, but only what can belong to the set is ranked.

    Tokens of less than half of (total - target) / vocab_size cannot: all of them together weigh
    less than what the set may leave out.
    """
    if top_p >= 1.0:
        return 0.0
    target = top_p * total
    ranked = np.sort(probs[probs >= (total - target) / (2 * len(probs))])[::-1]
    ends = np.cumsum(ranked, dtype=np.float64)
    return float(ranked[min(int(np.searchsorted(ends, target)), len(ranked) - 1)])


def sum_rows(probs: Tensor) -> Tensor:
    """float64 [n]: each row's sum, in an order that does not depend on the number of rows."""
    return sum_columns(probs)[0].sum(dim=-1, dtype=torch.float64)


def sum_columns(weights: Tensor) -> tuple[Tensor, int]:
    """Sums of the tokens i, i + w, i + 2w, … (128 of them) for i below w = vocab_size // 128.

    Returns:
        float32 [n, w + vocab_size % 128]; the last vocab_size % 128 tokens stand alone. And w.
        Additions of whole slices: the same order for every row and every number of rows.
    """
    num_columns = weights.shape[1] // NUM_MEMBERS
    body = weights[:, : num_columns * NUM_MEMBERS]
    sums = torch.unflatten(body, 1, (NUM_MEMBERS, num_columns))
    half = NUM_MEMBERS // 2
    while half:
        sums = sums[:, :half] + sums[:, half:]
        half //= 2
    return torch.cat((sums.squeeze(1), weights[:, num_columns * NUM_MEMBERS :]), dim=1), num_columns
