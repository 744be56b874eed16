"""Choose the tokens of a batch in one operation, from tables that say what each row asks for.

What is done and in which order is said in kernels/sampling.py; here every step works from tensors
that stay on the device, and tokens that a row has seen are counted there too, so that nothing of
the last step has to be known on the host before the next one is chosen.

Broken   A row that holds NaN or infinity has no token (BROKEN), nor has one of which penalties,
         additions and mask together leave nothing (NO_TOKEN).
Ties     Greedy rows are the reference's to the bit. A drawn token is, where probabilities are:
         implementations round exponentials and sums differently, so a token may differ where the
         noise lies within some 1e-6 of the border between two, or a probability equals a bound of
         truncation in all but its last bit. Either way it depends on its own row alone.
Public   TokenTables, Chosen, choose_tokens, choose_tokens_reference, is_fused, mark_prompt,
         add_counts, NO_TOKEN, BROKEN
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.dispatch import accepts, check, dispatch
from kernels.sampling import (
    GREEDY_BELOW,
    apply_bitmask,
    apply_penalties,
    draw,
    greedy,
    top_logprobs,
    uniform,
)

NO_TOKEN, BROKEN = -1, -2
"""In the place of a token id: nothing is left to choose from; the logits are not finite."""
MAX_COUNT = 2**15 - 1
"""Occurrences of a token in one output beyond which none is counted."""
IN_PROMPT = -(2**15)
"""Set in a count: the prompt has the token, which the repetition penalty minds."""

FLOATS = ("temperature", "min_p", "top_p", "repetition", "presence", "frequency")
"""Rows of TokenTables.floats. Neutral are 0, 0, 1, 1, 0 and 0; greedy is below GREEDY_BELOW."""
INTS = (
    "top_k",
    "counts",
    "is_counted",
    "mask",
    "logprobs",
    "additions",
    "additions_end",
    "drafts",
    "drafts_end",
)
"""Rows of TokenTables.ints; neutral are 0, or -1 where they are places in a table:

top_k                    how many, 0: all
counts                   the place of the row's counts
is_counted               1: the token that is chosen is counted there
mask                     the place of its mask
logprobs                 its place in what Chosen tells of log-probabilities
additions, additions_end which additions are its own: those from the first up to the last
drafts, drafts_end       likewise of draft_ids, tokens that count as if they had been chosen
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTables:
    """What n rows ask for, on the device of their logits."""

    floats: Tensor
    """float32 [len(FLOATS), n]."""
    ints: Tensor
    """int32 [len(INTS), n]."""
    seeds: Tensor
    """int64 [n]."""
    positions: Tensor
    """int64 [n]: how many tokens the output has before the one that is chosen."""
    counts: Tensor
    """int16 [num_counted, vocab_size]: occurrences of each token in an output, and IN_PROMPT."""
    addition_ids: Tensor
    """int32 [num_additions]: tokens to whose logits something is added, one after the other."""
    amounts: Tensor
    """float32 [num_additions]; minus infinity forbids."""
    until: Tensor
    """int32 [num_additions]: only at positions below."""
    draft_ids: Tensor
    """int32 [num_draft_ids]."""
    bitmask: Tensor
    """int32 [num_masks, ceil(vocab_size / 32)], as apply_bitmask takes it."""
    num_reported: int
    """Rows that want log-probabilities; their places are 0, 1, …, in the rows' order."""
    num_top: int
    """How many of the most likely tokens they want, at most vocab_size."""
    has_draws: bool
    """Whether any row is not greedy."""

    def number(self, name: str) -> Tensor:
        """[n] of floats or of ints."""
        table, names = (self.floats, FLOATS) if name in FLOATS else (self.ints, INTS)
        return table[names.index(name)]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen, on the device."""

    token_ids: Tensor
    """int64 [n]; BROKEN or NO_TOKEN where there is none."""
    logprobs: Tensor
    """float32 [num_reported]: of the chosen token, from unchanged logits."""
    top_logprobs: Tensor
    """float32 [num_reported, num_top]: of the most likely ones, best first."""
    top_ids: Tensor
    """int64 [num_reported, num_top]."""


def choose_tokens(logits: Tensor, tables: TokenTables) -> Chosen:
    """Choose a token for each row and count it where that is asked for.

    Args:
        logits: float32 [n, vocab_size]. Not changed.
        tables: what the rows ask for; counts are changed.
    """
    num_rows, vocab_size = logits.shape
    check(logits.dtype == torch.float32, "logits.dtype", torch.float32, logits.dtype)
    for name, found, expected in (
        ("floats", tables.floats.shape, (len(FLOATS), num_rows)),
        ("ints", tables.ints.shape, (len(INTS), num_rows)),
        ("seeds", tables.seeds.shape, (num_rows,)),
        ("positions", tables.positions.shape, (num_rows,)),
        ("counts", tables.counts.shape[1:], (vocab_size,)),
        ("bitmask", tables.bitmask.shape[1:], ((vocab_size + 31) // 32,)),
    ):
        check(tuple(found) == expected, f"{name}.shape", expected, tuple(found))
    for field in fields(tables):
        table = getattr(tables, field.name)
        if isinstance(table, Tensor):
            here = logits.device
            check(table.device == here, f"{field.name}.device", here, table.device)
            check(table.is_contiguous(), field.name, "a contiguous tensor", table.stride())
    return dispatch("choose_tokens", choose_tokens_reference, logits, tables)


def is_fused(logits: Tensor) -> bool:
    """Whether an implementation takes logits like these: else it is faster to call the functions
    of kernels/sampling.py one by one, only those that the batch needs."""
    return accepts("choose_tokens", logits, None)


def mark_prompt(counts: Tensor, row: int, token_ids: Tensor) -> None:
    """Begin a row of counts: nothing has occurred, and the prompt has these tokens (int64)."""
    counts[row].zero_().index_fill_(0, token_ids, IN_PROMPT)


def add_counts(counts: Tensor, rows: Tensor, token_ids: Tensor, numbers: Tensor) -> None:
    """Count occurrences in outputs.

    Args:
        counts:    int16 [num_counted, vocab_size], changed.
        rows:      int64 [num_entries]; each (row, token id) pair occurs once.
        token_ids: int64 [num_entries].
        numbers:   int64 [num_entries], at most MAX_COUNT.
    """
    before = counts[rows, token_ids].int()
    after = ((before & MAX_COUNT) + numbers).clamp_(max=MAX_COUNT)
    counts[rows, token_ids] = (after | (before & IN_PROMPT)).to(torch.int16)


def choose_tokens_reference(logits: Tensor, tables: TokenTables) -> Chosen:
    """The same result with the functions of kernels/sampling.py."""
    changed = logits.clone()
    is_broken = ~logits.isfinite().all(dim=-1)
    changed[is_broken] = 0.0
    for row in range(len(logits)):
        _change(changed, row, tables)
    is_dead = changed.amax(dim=-1) == -torch.inf
    changed[is_dead] = 0.0
    token_ids = greedy(changed)
    temperature = tables.number("temperature")
    is_drawn = temperature >= GREEDY_BELOW
    if is_drawn.any():
        min_p, top_k, top_p = (tables.number(x)[is_drawn] for x in ("min_p", "top_k", "top_p"))
        token_ids[is_drawn] = draw(
            changed[is_drawn],
            temperature[is_drawn],
            uniform(tables.seeds, tables.positions)[is_drawn],
            min_p=min_p if (min_p > 0).any() else None,
            top_k=top_k.long() if (top_k > 0).any() else None,
            top_p=top_p if (top_p < 1).any() else None,
        )
    _count(tables, token_ids, ~(is_broken | is_dead))
    reported = tables.number("logprobs") >= 0
    logprobs, values, ids = top_logprobs(logits[reported], token_ids[reported], tables.num_top)
    token_ids = token_ids.masked_fill(is_dead, NO_TOKEN).masked_fill(is_broken, BROKEN)
    return Chosen(token_ids, logprobs, values, ids)


def _change(logits: Tensor, row: int, tables: TokenTables) -> None:
    """Steps 1 to 4 of one row, in place."""
    place, first, end = (
        int(tables.number(name)[row]) for name in ("counts", "drafts", "drafts_end")
    )
    if place >= 0:
        seen = tables.counts[place].int()  # [vocab_size]
        counts = (seen & MAX_COUNT).float()
        drafts = tables.draft_ids[first:end].long()
        counts.index_add_(0, drafts, torch.ones(len(drafts), device=logits.device))
        token_ids = ((seen != 0) | (counts > 0)).nonzero().squeeze(1)
        repetition, presence, frequency = (
            tables.number(name)[row].expand(len(token_ids))
            for name in ("repetition", "presence", "frequency")
        )
        rows = torch.full_like(token_ids, row)
        apply_penalties(logits, rows, token_ids, counts[token_ids], repetition, presence, frequency)
    for i in range(*(int(tables.number(name)[row]) for name in ("additions", "additions_end"))):
        if tables.positions[row] < tables.until[i]:
            logits[row, tables.addition_ids[i].long()] += tables.amounts[i]
    mask = int(tables.number("mask")[row])
    if mask >= 0:
        apply_bitmask(logits, [row], tables.bitmask[mask : mask + 1].cpu())


def _count(tables: TokenTables, token_ids: Tensor, is_alive: Tensor) -> None:
    rows = ((tables.number("is_counted") != 0) & is_alive).nonzero().squeeze(1)
    places = tables.number("counts")[rows].long()
    add_counts(tables.counts, places, token_ids[rows], torch.ones_like(rows))
