"""What the rows of a batch ask of their tokens, for the operators that run one by one.

A parameter that no sequence uses costs nothing; what stays from step to step is on the device, what
penalties mind goes there with each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.token_tables import has_penalties
from engine.transfers import to_device
from kernels.choice import BROKEN, NO_TOKEN
from kernels.sampling import (
    GREEDY_BELOW,
    apply_bitmask,
    apply_penalties,
    draw,
    greedy,
    top_logprobs,
    uniform,
)


@dataclass(slots=True)
class BatchOperators:
    """A batch's parameters as tensors on the logits' device; rows are row numbers."""

    sequences: list[Sequence]
    offsets: list[int]
    """[num_rows]: how many drafts a row takes for chosen."""
    mask_rows: list[int]
    """The rows that have a mask, in the order of the masks."""
    device: torch.device
    greedy_rows: list[int] = field(default_factory=list)
    drawn_rows: list[int] = field(default_factory=list)
    greedy_index: Tensor | None = None
    """int64, greedy_rows on the device, and so on: a list would make indexing wait for it."""
    drawn_index: Tensor | None = None
    seeds: Tensor | None = None  # int64 [num_drawn], on the CPU
    temperature: Tensor | None = None  # float32 [num_drawn]
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    penalty_rows: list[int] = field(default_factory=list)
    penalties: Tensor | None = None  # float32 [num_penalised, 3]: repetition, presence, frequency
    bias: tuple[Tensor, Tensor, Tensor] | None = None  # rows, token ids, amounts
    min_tokens_rows: list[int] = field(default_factory=list)
    logprob_rows: list[int] = field(default_factory=list)
    logprob_index: Tensor | None = None
    num_logprobs: int = 0

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalty_rows or self.bias or self.min_tokens_rows or self.mask_rows)

    def num_output_tokens(self, row: int) -> int:
        """Tokens before the one that a row chooses."""
        return len(self.sequences[row].output_token_ids) + self.offsets[row]

    def choose(self, logits: Tensor, bitmask: Tensor | None) -> tuple[Tensor, ...]:
        """Token ids, and behind them what top_logprobs gives, where a row asked.

        Args:
            logits:  float32 [num_rows, vocab_size]; changed.
            bitmask: int32 [num_masks, words] on the CPU.

        Returns:
            int64 [num_rows], NO_TOKEN or BROKEN where there is none; and the rest.
        """
        raw = logits[self.logprob_index] if self.logprob_rows else None
        total = logits.sum(dim=-1)  # one reduction: finite logits have a finite sum
        is_broken = total - total != 0  # NaN less NaN and infinity less infinity are NaN
        if self.changes_logits:
            _change_logits(self, logits, bitmask)
        token_ids = _choose(self, logits, is_broken)
        if raw is None:
            return (token_ids,)
        chosen = token_ids[self.logprob_index].clamp(min=0)
        return token_ids, *top_logprobs(raw, chosen, self.num_logprobs)


def make_batch_operators(
    sequences: list[Sequence],
    offsets: list[int],
    *,
    mask_rows: list[int],
    device: torch.device,
) -> BatchOperators:
    """What the operators need of a batch; arguments as BatchOperators has them."""
    batch = BatchOperators(sequences, offsets, mask_rows, device)
    params = [sequence.params for sequence in sequences]
    for row, p in enumerate(params):
        (batch.drawn_rows if p.temperature >= GREEDY_BELOW else batch.greedy_rows).append(row)
        if has_penalties(p):
            batch.penalty_rows.append(row)
        if p.min_tokens > len(sequences[row].output_token_ids):
            batch.min_tokens_rows.append(row)
        if p.logprobs is not None:
            batch.logprob_rows.append(row)
            batch.num_logprobs = max(batch.num_logprobs, p.logprobs)

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(torch.tensor(list(values), dtype=dtype), batch.device)

    batch.logprob_index = column(batch.logprob_rows, torch.int64)
    batch.greedy_index = column(batch.greedy_rows, torch.int64)
    batch.drawn_index = column(batch.drawn_rows, torch.int64)
    drawn = [params[row] for row in batch.drawn_rows]
    if drawn:
        batch.seeds = torch.tensor([batch.sequences[row].seed for row in batch.drawn_rows])
        batch.temperature = column(p.temperature for p in drawn)
        if any(p.min_p > 0.0 for p in drawn):
            batch.min_p = column(p.min_p for p in drawn)
        if any(p.top_k > 0 for p in drawn):
            batch.top_k = column((p.top_k for p in drawn), torch.int64)
        if any(p.top_p < 1.0 for p in drawn):
            batch.top_p = column(p.top_p for p in drawn)
    if batch.penalty_rows:
        kept = [params[row] for row in batch.penalty_rows]
        batch.penalties = torch.tensor(
            [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in kept]
        )
    biases = [(row, *entry) for row, p in enumerate(params) for entry in p.logit_bias]
    if biases:
        rows, token_ids, amounts = zip(*biases, strict=True)
        batch.bias = (column(rows, torch.int64), column(token_ids, torch.int64), column(amounts))
    return batch


def _change_logits(batch: BatchOperators, logits: Tensor, bitmask: Tensor | None) -> None:
    """Steps 1 to 4 of the order in kernels/sampling.py, in place."""
    if batch.penalty_rows:
        _penalise(batch, logits)
    if batch.bias is not None:
        rows, token_ids, amounts = batch.bias
        logits.index_put_((rows, token_ids), amounts, accumulate=True)
    for row in batch.min_tokens_rows:
        sequence = batch.sequences[row]
        if batch.num_output_tokens(row) < sequence.params.min_tokens:
            stop = torch.tensor([i for i in sequence.stop_token_ids if i < logits.shape[1]])
            logits[row].index_fill_(0, to_device(stop.long(), batch.device), -torch.inf)
    if bitmask is not None:
        apply_bitmask(logits, batch.mask_rows, bitmask)


def _penalise(batch: BatchOperators, logits: Tensor) -> None:
    assert batch.penalties is not None
    entries = [_occurrences(batch.sequences[row], batch.offsets[row]) for row in batch.penalty_rows]
    lengths = torch.tensor([len(token_ids) for token_ids, _ in entries])
    token_ids = torch.cat([token_ids for token_ids, _ in entries])
    counts = torch.cat([counts for _, counts in entries])
    rows = torch.tensor(batch.penalty_rows).repeat_interleave(lengths)
    values = to_device(batch.penalties.repeat_interleave(lengths, dim=0), batch.device)
    rows, token_ids, counts = (to_device(x, batch.device) for x in (rows, token_ids, counts))
    apply_penalties(logits, rows, token_ids, counts, *values.unbind(dim=1))


def _choose(batch: BatchOperators, logits: Tensor, is_broken: Tensor) -> Tensor:
    """Token id of each row: int64 [num_seqs]; BROKEN or NO_TOKEN where there is none."""
    is_dead = is_broken
    if batch.changes_logits:
        is_dead = is_broken | (logits.amax(dim=-1) == -torch.inf)
    if logits.device.type == "cpu" and not is_dead.any():  # elsewhere asking would wait
        return _pick(batch, logits)
    logits.masked_fill_(is_dead[:, None], 0.0)
    token_ids = _pick(batch, logits)
    return token_ids.masked_fill_(is_dead, NO_TOKEN).masked_fill_(is_broken, BROKEN)


def _pick(batch: BatchOperators, logits: Tensor) -> Tensor:
    """Token id of each row, whose largest logit is finite: int64 [num_seqs]."""
    if not batch.drawn_rows:
        return greedy(logits)
    assert batch.seeds is not None and batch.temperature is not None
    assert batch.drawn_index is not None and batch.greedy_index is not None
    positions = [batch.num_output_tokens(row) for row in batch.drawn_rows]
    noise = to_device(uniform(batch.seeds, torch.tensor(positions)), batch.device)
    drawn = draw(
        logits[batch.drawn_index] if batch.greedy_rows else logits,
        batch.temperature,
        noise,
        min_p=batch.min_p,
        top_k=batch.top_k,
        top_p=batch.top_p,
    )
    if not batch.greedy_rows:
        return drawn
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=batch.device)
    token_ids[batch.drawn_index] = drawn
    token_ids[batch.greedy_index] = greedy(logits[batch.greedy_index])
    return token_ids


class _Occurrences:
    """Which tokens a sequence holds and how often its output does, kept from step to step."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.token_ids = np.fromiter(dict.fromkeys(prompt_token_ids), dtype=np.int64)
        self.counts = np.zeros(len(self.token_ids), dtype=np.float32)
        self.index: dict[int, int] = {int(token_id): i for i, token_id in enumerate(self.token_ids)}
        self.num_read = 0

    def read(self, output_token_ids: list[int]) -> None:
        """Count what has been appended since the last call."""
        for token_id in output_token_ids[self.num_read :]:
            place = self.index.setdefault(token_id, len(self.index))
            if place == len(self.token_ids):
                self.token_ids = np.resize(self.token_ids, max(16, 2 * place))
                self.counts = np.concatenate(
                    (self.counts, np.zeros(len(self.token_ids) - place, dtype=np.float32))
                )
            self.token_ids[place] = token_id
            self.counts[place] += 1
        self.num_read = len(output_token_ids)


def _occurrences(sequence: Sequence, num_drafts: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [m] and their counts in the output float32 [m]; the prompt's where needed.

    The first num_drafts drafts count as output.
    """
    state = sequence.sampler_state
    if state is None:
        is_needed = sequence.params.repetition_penalty != 1.0
        state = _Occurrences(sequence.prompt_token_ids if is_needed else ())
        sequence.sampler_state = state
    state.read(sequence.output_token_ids)
    num_tokens = len(state.index)
    token_ids, counts = state.token_ids[:num_tokens], state.counts[:num_tokens]
    drafts = sequence.draft_token_ids[:num_drafts]
    if drafts:
        new = list(dict.fromkeys(token_id for token_id in drafts if token_id not in state.index))
        token_ids = np.append(token_ids, np.array(new, dtype=np.int64))
        counts = np.append(counts, np.zeros(len(new), dtype=np.float32))
        for token_id in drafts:
            is_known = token_id in state.index
            counts[state.index[token_id] if is_known else num_tokens + new.index(token_id)] += 1
    return torch.from_numpy(token_ids), torch.from_numpy(counts)
