"""What the rows of a batch ask of their tokens, as tables on the device (kernels/choice.py).

A batch's tables are made when its sequences change. From step to step only positions and masks
travel: what penalties count is counted on the device, by the operation that chooses the token.

Counts   A sequence with penalties has a row of counts while it is in the batch. It is filled from
         the sequence's tokens when the sequence joins, anew after a preemption or where a step was
         repeated after an error. Tokens behind drafts are counted when the host knows which are
         right.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.api import SamplingParams
from engine.sequence import Sequence
from engine.transfers import to_device
from kernels.choice import (
    FLOATS,
    INTS,
    MAX_COUNT,
    TokenTables,
    add_counts,
    choose_tokens,
    mark_prompt,
)
from kernels.sampling import GREEDY_BELOW

ALWAYS = 2**31 - 1
"""A position that no output reaches."""


def has_penalties(params: SamplingParams) -> bool:
    """Whether tokens that have occurred weigh less, or more."""
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


@dataclass(slots=True)
class _Place:
    """A sequence's row of counts."""

    row: int
    num_counted: int = 0
    """How many output tokens it holds, the one that is being chosen among them."""


class TokenCounts:
    """Rows of counts for the sequences of one batch after the other."""

    def __init__(self) -> None:
        self._places: dict[Sequence, _Place] = {}
        self._counts: Tensor | None = None  # int16 [num_rows, vocab_size]

    def keep(self, sequences: SequenceOf[Sequence], vocab_size: int, device: torch.device) -> None:
        """Have a row for each of these sequences and for no other."""
        kept = {s: self._places[s] for s in sequences if s in self._places}
        if self._counts is None or self._counts.device != device or not sequences:
            kept, self._counts = {}, torch.zeros(0, vocab_size, dtype=torch.int16, device=device)
        taken = {place.row for place in kept.values()}
        if len(sequences) > len(self._counts):
            grown = self._counts.new_zeros(max(len(sequences), 2 * len(self._counts)), vocab_size)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        free = (row for row in range(len(self._counts)) if row not in taken)
        self._places = kept
        for sequence in sequences:
            if sequence not in kept:
                place = _Place(next(free))
                self._begin(sequence, place)
                self._places[sequence] = place

    def row(self, sequence: Sequence) -> int:
        """Where a sequence's counts are."""
        return self._places[sequence].row

    def bring_up_to_date(self) -> Tensor:
        """Count what has been appended and not been counted yet; int16 [num_rows, vocab_size]."""
        assert self._counts is not None
        rows: list[np.ndarray] = []
        token_ids: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        for sequence, place in self._places.items():
            output = sequence.output_token_ids
            if place.num_counted > len(output):  # a step was repeated
                self._begin(sequence, place)
            if place.num_counted < len(output):
                ids, times = np.unique(output[place.num_counted :], return_counts=True)
                rows.append(np.full(len(ids), place.row))
                token_ids.append(ids)
                numbers.append(np.minimum(times, MAX_COUNT))
                place.num_counted = len(output)
        if rows:
            add_counts(
                self._counts,
                *(
                    to_device(torch.from_numpy(np.concatenate(x)), self._counts.device)
                    for x in (rows, token_ids, numbers)
                ),
            )
        return self._counts

    def expect(self, sequences: SequenceOf[Sequence]) -> None:
        """The device counts one more token of each of these sequences."""
        for sequence in sequences:
            self._places[sequence].num_counted += 1

    def _begin(self, sequence: Sequence, place: _Place) -> None:
        """An empty row, with a mark at the prompt's tokens where that matters."""
        assert self._counts is not None
        place.num_counted = 0
        prompt = np.zeros(0, dtype=np.int64)
        if sequence.params.repetition_penalty != 1.0:
            prompt = np.unique(np.array(sequence.prompt_token_ids, dtype=np.int64))
        mark_prompt(
            self._counts, place.row, to_device(torch.from_numpy(prompt), self._counts.device)
        )


@dataclass(slots=True)
class BatchTables:
    """One batch's tables, and what changes in them from step to step."""

    tables: TokenTables
    sequences: list[Sequence]
    offsets: list[int]
    """[num_rows]: how many drafts a row takes for chosen."""
    penalised: list[Sequence]
    """Those that have penalties, once each."""
    counts: TokenCounts

    def choose(self, logits: Tensor, bitmask: Tensor | None) -> tuple[Tensor, ...]:
        """Token ids, and behind them what top_logprobs gives, where a row asked.

        Args:
            logits:  float32 [num_rows, vocab_size].
            bitmask: int32 [num_masks, words] on the CPU.

        Returns:
            int64 [num_rows], NO_TOKEN or BROKEN where there is none; and the rest.
        """
        chosen = choose_tokens(logits, self._next_step(bitmask))
        if not self.tables.num_reported:
            return (chosen.token_ids,)
        return chosen.token_ids, chosen.logprobs, chosen.top_logprobs, chosen.top_ids

    def _next_step(self, bitmask: Tensor | None) -> TokenTables:
        device = self.tables.floats.device
        positions = [
            len(sequence.output_token_ids) + offset
            for sequence, offset in zip(self.sequences, self.offsets, strict=True)
        ]
        step = replace(
            self.tables,
            positions=to_device(torch.tensor(positions), device),
            counts=self.counts.bring_up_to_date(),
        )
        draft_ids = [token_id for s in self.penalised for token_id in s.draft_token_ids]
        if draft_ids:
            sent = to_device(torch.tensor(draft_ids, dtype=torch.int32), device)
            step = replace(step, draft_ids=sent)
        # The token of a sequence with drafts may be thrown away: the host counts it later.
        self.counts.expect([s for s in self.penalised if not s.draft_token_ids])
        return step if bitmask is None else replace(step, bitmask=to_device(bitmask, device))


def make_batch_tables(
    sequences: list[Sequence],
    offsets: list[int],
    counts: TokenCounts,
    *,
    mask_rows: SequenceOf[int],
    vocab_size: int,
    device: torch.device,
) -> BatchTables:
    """Tables of a batch; positions, masks and drafts are those of no step yet.

    Args:
        sequences: [num_rows]; one with drafts stands there once more for each.
        offsets:   [num_rows]: how many drafts a row takes for chosen.
        counts:    gets rows for the sequences that have penalties.
        mask_rows: the rows that have a mask, in the order of the masks.
        vocab_size: of the logits.
        device:    theirs.
    """
    penalised = [s for s in dict.fromkeys(sequences) if has_penalties(s.params)]
    counts.keep(penalised, vocab_size, device)
    floats = np.zeros((len(FLOATS), len(sequences)), dtype=np.float32)
    ints = np.zeros((len(INTS), len(sequences)), dtype=np.int32)
    number = dict(zip((*FLOATS, *INTS), (*floats, *ints), strict=True))
    for name in ("counts", "mask", "logprobs"):
        number[name][:] = -1
    number["repetition"][:] = 1.0
    additions: list[tuple[int, float, int]] = []
    num_draft_ids = 0
    for row, (sequence, offset) in enumerate(zip(sequences, offsets, strict=True)):
        p = sequence.params
        is_drawn = p.temperature >= GREEDY_BELOW
        number["temperature"][row] = p.temperature if is_drawn else 0.0
        number["min_p"][row], number["top_p"][row] = p.min_p, p.top_p
        number["top_k"][row] = min(max(p.top_k, 0), vocab_size)
        if has_penalties(p):
            number["repetition"][row] = p.repetition_penalty
            number["presence"][row] = p.presence_penalty
            number["frequency"][row] = p.frequency_penalty
            number["counts"][row] = counts.row(sequence)
            number["is_counted"][row] = not sequence.draft_token_ids
            if offset == 0:
                num_draft_ids += len(sequence.draft_token_ids)
            number["drafts"][row] = num_draft_ids - len(sequence.draft_token_ids)
            number["drafts_end"][row] = number["drafts"][row] + offset
        if p.logit_bias or p.min_tokens:
            number["additions"][row] = len(additions)
            additions += _additions(sequence, vocab_size)
            number["additions_end"][row] = len(additions)
    number["mask"][list(mask_rows)] = range(len(mask_rows))
    reported = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
    number["logprobs"][reported] = range(len(reported))
    num_top = max((s.params.logprobs or 0 for s in sequences), default=0)

    def sent(values: object, dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), device)

    tables = TokenTables(
        floats=to_device(torch.from_numpy(floats), device),
        ints=to_device(torch.from_numpy(ints), device),
        seeds=sent([s.seed for s in sequences], torch.int64),
        positions=sent([0] * len(sequences), torch.int64),
        counts=counts.bring_up_to_date(),
        addition_ids=sent([token_id for token_id, _, _ in additions], torch.int32),
        amounts=sent([amount for _, amount, _ in additions], torch.float32),
        until=sent([position for _, _, position in additions], torch.int32),
        draft_ids=sent([], torch.int32),
        bitmask=torch.zeros(0, (vocab_size + 31) // 32, dtype=torch.int32, device=device),
        num_reported=len(reported),
        num_top=min(num_top, vocab_size),
        has_draws=bool(number["temperature"].any()),
    )
    return BatchTables(tables, sequences, offsets, penalised, counts)


def _additions(sequence: Sequence, vocab_size: int) -> list[tuple[int, float, int]]:
    """(token id, amount, position from which on no more) of bias and of tokens that must wait."""
    biases = [(token_id, amount, ALWAYS) for token_id, amount in sequence.params.logit_bias]
    min_tokens = sequence.params.min_tokens
    if min_tokens <= len(sequence.output_token_ids):
        return biases
    stops = sorted(token_id for token_id in sequence.stop_token_ids if token_id < vocab_size)
    return biases + [(token_id, -np.inf, min_tokens) for token_id in stops]
