"""Choose one token per sequence from logits: penalties, masks, temperature, truncation, drawing.

Order    A row's logits pass through, each step skipped where its parameter is neutral:
         1 repetition penalty (tokens of prompt and output: divided if positive, else multiplied)
         2 frequency penalty times the count in the output, presence penalty once (subtracted)
         3 logit bias (added)
         4 forbidden tokens and the grammar's bitmask (minus infinity)
         5 temperature (divided), softmax
         6 min_p: drop tokens less likely than min_p times the most likely one
         7 top_k: keep the k most likely, and what equals the k-th
         8 top_p: of what is left, keep the fewest most likely tokens whose share is at least top_p,
           and what equals the least of them
         9 draw
         Steps 5 to 8 are in vLLM's order; 6 to 8 are in kernels/truncation.py and each drops what
         transformers' processor drops. Greedy rows end after 4 with the largest logit, the lowest
         token id among equals.
Noise    One uniform number per row, a hash of (seed, position): a token depends on its seed, its
         position and its logits, never on earlier draws, restarts or other rows.
Rows     No row's arithmetic depends on the others: reductions are softmax's, one row at a time, or
         sums of a fixed tree.
Public   uniform, apply_penalties, apply_bitmask, greedy, draw, top_logprobs
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.truncation import NUM_MEMBERS, sum_columns, truncate

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy, as in vLLM: the quotient would overflow or decide alike."""


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) from a counter-based hash, without any state.

    The output function of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, 2014), applied to the seed, then to the sum of that and the position's multiple of
    the golden gamma: position i takes the i-th output of a SplitMix64 generator that starts at the
    hash of the seed. The highest 53 bits are the number.

    Args:
        seeds:     int64 [n], any value.
        positions: int64 [n], any value.

    Returns:
        float64 [n], multiples of 2**-53.
    """
    state = _mix(seeds + GOLDEN_GAMMA) + (positions + 1) * GOLDEN_GAMMA
    return _shift_right(_mix(state), 11).to(torch.float64) * 2.0**-53


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap around, which is the arithmetic it wants."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Logical shift: int64's own repeats the sign bit."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise tokens that have occurred, in place.

    Args:
        logits:     float32 [num_seqs, vocab_size].
        rows:       int64 [num_entries]; each (row, token id) pair occurs once.
        token_ids:  int64 [num_entries].
        counts:     float32 [num_entries]: occurrences in the output; 0 for the prompt's alone.
        repetition: float32 [num_entries], the row's repetition penalty; 1 is neutral.
        presence, frequency: float32 [num_entries], likewise; 0 is neutral.
    """
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    logits[rows, token_ids] = values


def apply_bitmask(logits: Tensor, rows: list[int], bitmask: Tensor) -> None:
    """Set what a grammar does not allow to minus infinity, in place.

    Args:
        logits:  float32 [num_seqs, vocab_size].
        rows:    the rows that have a grammar.
        bitmask: int32 [len(rows), ceil(vocab_size / 32)] on the CPU; bit i % 32 of word i // 32 is
                 token i, 1 where allowed.
    """
    vocab_size = logits.shape[1]
    num_words = (vocab_size + 31) // 32
    check(bitmask.dtype == torch.int32, "bitmask.dtype", torch.int32, bitmask.dtype)
    expected = (len(rows), num_words)
    check(bitmask.shape == expected, "bitmask.shape", expected, tuple(bitmask.shape))
    dispatch("apply_bitmask", apply_bitmask_reference, logits, rows, bitmask)


def apply_bitmask_reference(logits: Tensor, rows: list[int], bitmask: Tensor) -> None:
    """apply_bitmask with numpy and PyTorch."""
    vocab_size = logits.shape[1]
    packed = np.ascontiguousarray(bitmask.numpy()).view(np.uint8)
    bits = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
    is_forbidden = torch.from_numpy(bits == 0).to(logits.device)  # [len(rows), vocab_size]
    for i, row in enumerate(rows):
        logits[row].masked_fill_(is_forbidden[i], -torch.inf)


def greedy(logits: Tensor) -> Tensor:
    """Largest logit of each row, the lowest token id among equals: int64 [n]."""
    if logits.device.type == "cpu":  # the same rule, and 5 times as fast as torch's
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def draw(
    logits: Tensor,
    temperature: Tensor,
    noise: Tensor,
    *,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
) -> Tensor:
    """Steps 5 to 9: one token per row.

    Args:
        logits:      float32 [n, vocab_size]; minus infinity is never drawn. Each row has a finite
                     largest value. Overwritten with probabilities.
        temperature: float32 [n], at least GREEDY_BELOW.
        noise:       float64 [n] in [0, 1), see uniform.
        min_p:       float32 [n] in [0, 1]; 0 is neutral, and so is None for all rows.
        top_k:       int64 [n]; 0 is neutral.
        top_p:       float32 [n] in (0, 1]; 1 is neutral.

    Returns:
        int64 [n].
    """
    # In place: what is allocated anew each step costs more in page faults than the arithmetic does.
    scaled = logits.div_(temperature[:, None])
    probs = torch.softmax(scaled, dim=-1, out=scaled)  # [n, vocab_size]
    truncate(probs, min_p=min_p, top_k=top_k, top_p=top_p)
    return _invert(probs, noise)


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Inverse of the cumulative distribution, in two levels of float64 sums: int64 [n].

    A token of weight zero is never chosen. Tokens lie on the line in the order of their columns.
    """
    sums, num_columns = sum_columns(weights)
    sums = sums.double()
    ends = sums.cumsum(dim=-1)
    column, offset = _find(ends, noise * ends[:, -1])  # [n, 1], [n, 1]
    is_alone = column >= num_columns
    inside = torch.where(is_alone, 0, column)
    strides = torch.arange(NUM_MEMBERS, device=weights.device) * num_columns
    members = weights.gather(1, (inside + strides).clamp(max=weights.shape[1] - 1))  # [n, 128]
    member, _ = _find(members.cumsum(dim=-1, dtype=torch.float64), offset.squeeze(1))
    alone = column + num_columns * (NUM_MEMBERS - 1)
    return torch.where(is_alone, alone, inside + member * num_columns).squeeze(1)


def _find(ends: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """First interval that ends beyond its row's target, and how far into it the target lies.

    Args:
        ends:    float64 [n, m], ascending.
        targets: float64 [n], at least 0.

    Returns:
        int64 [n, 1] and float64 [n, 1]. The interval found is never empty: its end exceeds the
        one before. A target at or beyond the last end is moved just below it.
    """
    targets = torch.minimum(targets, torch.nextafter(ends[:, -1], ends.new_zeros(())))[:, None]
    index = torch.searchsorted(ends, targets, right=True)
    index = index.clamp(max=ends.shape[1] - 1)
    starts = torch.where(index > 0, ends.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index, targets - starts


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen and of the most likely tokens, from unchanged logits.

    Args:
        logits:    float32 [n, vocab_size].
        token_ids: int64 [n], the chosen tokens.
        num_top:   how many of the most likely to report, 0 for none.

    Returns:
        Of the chosen float32 [n]; of the most likely float32 [n, num_top], best first; and their
        ids int64 [n, num_top].
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None]).squeeze(1)
    top = logprobs.topk(min(num_top, logits.shape[1]), dim=-1)
    return chosen, top.values, top.indices
