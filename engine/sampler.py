"""From logits to tokens: each sequence's parameters, gathered into tensors, and the operators.

A sequence with drafts (engine/speculation.py) has a row more for each of them, behind its own: at
row i it is looked at as if its first i drafts had been chosen.

Launched first and finished later: launch only queues work for the device, finish reads what that
has chosen, and in between the next step's layers may be launched.

The arithmetic and its order are in kernels/sampling.py. What a batch needs is worked out when its
list of sequences changes and kept as long as it stays, which while decoding is many steps; a
parameter that no sequence uses costs nothing. Where an implementation chooses tokens in one
operation (on a GPU), engine/token_tables.py holds what it needs; else the operators run one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.acceptance import as_engine_error
from engine.api import GenerateRequest, SamplingParams, TokenLogprobs
from engine.errors import EngineError, GrammarError, RequestError
from engine.grammar import GrammarMatcher
from engine.sequence import Sequence
from engine.token_tables import BatchTables, TokenCounts, has_penalties, make_batch_tables
from engine.transfers import HostCopy, copy_to_host, to_device
from kernels.choice import BROKEN, NO_TOKEN, TokenTables, choose_tokens, is_fused
from kernels.sampling import (
    GREEDY_BELOW,
    apply_bitmask,
    apply_penalties,
    draw,
    greedy,
    top_logprobs,
    uniform,
)


class SamplingError(EngineError):
    """The model's output for a sequence is broken; it ends, the others go on."""

    code = "sampling_failed"


class NoTokenLeft(RequestError):
    """What a request asks for excludes every token."""

    code = "no_token_left"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's token, or the reason why there is none."""

    token_id: int
    """-1 where there is an error, and where the text does not come to: behind a draft that was not
    chosen, or behind the end of a grammar."""
    logprobs: TokenLogprobs | None = None
    """Where the request asked for them."""
    error: EngineError | None = None


NOT_REACHED = SampledToken(-1)


class Sampler:
    """Keeps what the last batch needed. One thread calls it."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._counts = TokenCounts()

    def launch(self, logits: Tensor, sequences: list[Sequence]) -> Pending:
        """Have the device choose the next token of each sequence, without waiting for it.

        Changes nothing that the sequences hold: after an error it may be called again. What was
        launched before has been finished, because a grammar has to know the last token.

        Args:
            logits: float32 [num_rows, vocab_size], row i of sequences[i]. May be changed.
            sequences: [num_rows], their earlier tokens all appended; one with drafts stands there
                once more for each.
        """
        plan = self._plan
        if plan is None or plan.sequences != sequences or plan.device != logits.device:
            plan = self._plan = _make_plan(sequences, logits, self._counts)
        errors: dict[int, EngineError] = {}
        if plan.matchers:  # first: on a GPU the model is still running
            _fill_masks(plan, errors)
        if plan.tables is not None:
            found = _choose_at_once(plan.tables.next_step(self._counts, plan.bitmask), logits)
        else:
            found = _choose_by_operators(plan, logits)
        return Pending(plan, found[0], copy_to_host(*found), errors)

    def finish(self, pending: Pending) -> list[SampledToken]:
        """Wait for what was launched, and for nothing else.

        A grammar's matcher goes on by the chosen token here: callers do not accept it again.
        Appending the token to the sequence is the caller's.

        Returns:
            One entry per row. A row has an error, and the others their tokens, when its
            logits hold NaN or infinity, when penalties, bias and grammar together leave no
            token, or when its grammar exceeds its limits.
        """
        plan, errors = pending.plan, pending.errors
        chosen, *reported = (x.tolist() for x in pending.copy.wait())
        token_ids: list[int] = chosen
        for row, token_id in enumerate(token_ids):
            if token_id < 0:
                errors.setdefault(row, _dead_row_error(token_id == BROKEN))
        is_reached = _follow(plan, token_ids, errors)
        logprobs = _report(plan, reported, token_ids) if reported else {}
        if not errors and not logprobs and not plan.has_drafts:
            return [SampledToken(token_id) for token_id in token_ids]
        return [
            NOT_REACHED
            if not is_reached[row]
            else SampledToken(-1, None, errors[row])
            if row in errors
            else SampledToken(token_id, logprobs.get(row))
            for row, token_id in enumerate(token_ids)
        ]

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """Both at once."""
        return self.finish(self.launch(logits, sequences))

    @torch.inference_mode()
    def warm_up(self, vocab_size: int, device: torch.device) -> None:
        """Choose a token of nothing, so that kernels are compiled before a request waits for it."""
        params = SamplingParams(max_tokens=1, temperature=1.0, top_k=2, top_p=0.5, logprobs=1)
        request = GenerateRequest(request_id="warm-up", prompt_token_ids=(0,), params=params)
        self.sample(torch.zeros(1, vocab_size, device=device), [Sequence(request, arrival=0)])
        self._plan = None


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens that the device has been told to choose."""

    plan: _Plan
    token_ids: Tensor
    """int64 [num_rows], on the device: NO_TOKEN or BROKEN where there is none."""
    copy: HostCopy
    """The same for the host; behind it what top_logprobs gives, where a row asked for that."""
    errors: dict[int, EngineError]
    """By row: known before the tokens are."""

    @property
    def sequences(self) -> list[Sequence]:
        """[num_rows]."""
        return self.plan.sequences


@dataclass(slots=True)
class _Plan:
    """A batch's parameters as tensors on the logits' device; rows are row numbers."""

    sequences: list[Sequence]
    device: torch.device
    offsets: list[int] = field(default_factory=list)
    """[num_rows]: how many drafts a row takes for chosen."""
    has_drafts: bool = False
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
    matchers: dict[int, GrammarMatcher] = field(default_factory=dict)
    """By row; a sequence's rows have the same."""
    bitmask: Tensor | None = None  # int32 [num_grammars, words], on the CPU
    tables: BatchTables | None = None
    """Where tokens are chosen in one operation; then nothing else here is on the device."""
    logprob_rows: list[int] = field(default_factory=list)
    logprob_index: Tensor | None = None
    num_logprobs: int = 0

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalty_rows or self.bias or self.min_tokens_rows or self.matchers)

    def num_output_tokens(self, row: int) -> int:
        """Tokens before the one that a row chooses."""
        return len(self.sequences[row].output_token_ids) + self.offsets[row]


def _make_plan(sequences: list[Sequence], logits: Tensor, counts: TokenCounts) -> _Plan:
    plan = _Plan(sequences=list(sequences), device=logits.device)
    params = [sequence.params for sequence in sequences]
    for row, sequence in enumerate(sequences):
        is_behind = row > 0 and sequences[row - 1] is sequence
        plan.offsets.append(plan.offsets[-1] + 1 if is_behind else 0)
    plan.has_drafts = any(plan.offsets)
    for row, p in enumerate(params):
        (plan.drawn_rows if p.temperature >= GREEDY_BELOW else plan.greedy_rows).append(row)
        if has_penalties(p):
            plan.penalty_rows.append(row)
        if p.min_tokens > len(sequences[row].output_token_ids):
            plan.min_tokens_rows.append(row)
        matcher = sequences[row].grammar
        if matcher is not None:
            plan.matchers[row] = matcher
        if p.logprobs is not None:
            plan.logprob_rows.append(row)
            plan.num_logprobs = max(plan.num_logprobs, p.logprobs)
    if plan.matchers:
        num_words = (logits.shape[1] + 31) // 32
        plan.bitmask = torch.empty((len(plan.matchers), num_words), dtype=torch.int32)
    if is_fused(logits):
        plan.tables = make_batch_tables(
            plan.sequences, plan.offsets, counts,
            mask_rows=list(plan.matchers), vocab_size=logits.shape[1], device=plan.device,
        )  # fmt: skip
    else:
        _add_columns(plan, params)
    return plan


def _add_columns(plan: _Plan, params: list[SamplingParams]) -> None:
    """What the operators need, on the device."""

    def column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(torch.tensor(list(values), dtype=dtype), plan.device)

    plan.logprob_index = column(plan.logprob_rows, torch.int64)
    plan.greedy_index = column(plan.greedy_rows, torch.int64)
    plan.drawn_index = column(plan.drawn_rows, torch.int64)
    drawn = [params[row] for row in plan.drawn_rows]
    if drawn:
        plan.seeds = torch.tensor([plan.sequences[row].seed for row in plan.drawn_rows])
        plan.temperature = column(p.temperature for p in drawn)
        if any(p.min_p > 0.0 for p in drawn):
            plan.min_p = column(p.min_p for p in drawn)
        if any(p.top_k > 0 for p in drawn):
            plan.top_k = column((p.top_k for p in drawn), torch.int64)
        if any(p.top_p < 1.0 for p in drawn):
            plan.top_p = column(p.top_p for p in drawn)
    if plan.penalty_rows:
        kept = [params[row] for row in plan.penalty_rows]
        plan.penalties = torch.tensor(
            [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in kept]
        )
    biases = [(row, *entry) for row, p in enumerate(params) for entry in p.logit_bias]
    if biases:
        rows, token_ids, amounts = zip(*biases, strict=True)
        plan.bias = (column(rows, torch.int64), column(token_ids, torch.int64), column(amounts))


def _fill_masks(plan: _Plan, errors: dict[int, EngineError]) -> None:
    """What may follow at each row; behind a draft, a copy of the matcher has accepted it."""
    assert plan.bitmask is not None
    follower = None
    for (row, matcher), mask in zip(plan.matchers.items(), plan.bitmask, strict=True):
        offset = plan.offsets[row]
        if offset <= 1:
            follower = matcher if offset == 0 else matcher.copy()
        assert follower is not None
        try:
            if offset > 0:
                follower.accept(plan.sequences[row].draft_token_ids[offset - 1])
            follower.fill_mask(mask)
        except GrammarError as error:
            errors[row] = error
            mask.fill_(-1)


def _follow(plan: _Plan, token_ids: list[int], errors: dict[int, EngineError]) -> list[bool]:
    """Which rows their texts come to, with the matchers moved on by the tokens there."""
    is_reached: list[bool] = []
    for row, offset in enumerate(plan.offsets):
        if offset > 0:
            draft = plan.sequences[row].draft_token_ids[offset - 1]
            before = plan.matchers.get(row)
            is_reached.append(
                is_reached[row - 1]
                and row - 1 not in errors
                and token_ids[row - 1] == draft
                and (before is None or not before.is_finished())
            )
        else:
            is_reached.append(True)
        matcher = plan.matchers.get(row)
        if matcher is not None and is_reached[row] and row not in errors:
            try:
                matcher.accept(token_ids[row])
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # this request's alone, even a native library's panic
                errors[row] = as_engine_error(error)
    return is_reached


def _choose_at_once(tables: TokenTables, logits: Tensor) -> tuple[Tensor, ...]:
    """Token ids int64 [num_rows], and behind them what top_logprobs gives, where a row asked."""
    chosen = choose_tokens(logits, tables)
    if not tables.num_reported:
        return (chosen.token_ids,)
    return chosen.token_ids, chosen.logprobs, chosen.top_logprobs, chosen.top_ids


def _choose_by_operators(plan: _Plan, logits: Tensor) -> tuple[Tensor, ...]:
    """The same, operator by operator; changes the logits."""
    raw = logits[plan.logprob_index] if plan.logprob_rows else None
    is_broken = ~logits.sum(dim=-1).isfinite()  # one reduction: finite logits have such a sum
    if plan.changes_logits:
        _change_logits(plan, logits)
    token_ids = _choose(plan, logits, is_broken)
    return (token_ids,) if raw is None else (token_ids, *_logprobs(plan, raw, token_ids))


def _change_logits(plan: _Plan, logits: Tensor) -> None:
    """Steps 1 to 4 of the order in kernels/sampling.py, in place."""
    if plan.penalty_rows:
        _penalise(plan, logits)
    if plan.bias is not None:
        rows, token_ids, amounts = plan.bias
        logits.index_put_((rows, token_ids), amounts, accumulate=True)
    for row in plan.min_tokens_rows:
        sequence = plan.sequences[row]
        if plan.num_output_tokens(row) < sequence.params.min_tokens:
            stop = torch.tensor([i for i in sequence.stop_token_ids if i < logits.shape[1]])
            logits[row].index_fill_(0, to_device(stop.long(), plan.device), -torch.inf)
    if plan.bitmask is not None:
        apply_bitmask(logits, list(plan.matchers), plan.bitmask)


def _penalise(plan: _Plan, logits: Tensor) -> None:
    assert plan.penalties is not None
    entries = [_occurrences(plan.sequences[row], plan.offsets[row]) for row in plan.penalty_rows]
    lengths = torch.tensor([len(token_ids) for token_ids, _ in entries])
    token_ids = torch.cat([token_ids for token_ids, _ in entries])
    counts = torch.cat([counts for _, counts in entries])
    rows = torch.tensor(plan.penalty_rows).repeat_interleave(lengths)
    values = to_device(plan.penalties.repeat_interleave(lengths, dim=0), plan.device)
    rows, token_ids, counts = (to_device(x, plan.device) for x in (rows, token_ids, counts))
    apply_penalties(logits, rows, token_ids, counts, *values.unbind(dim=1))


def _choose(plan: _Plan, logits: Tensor, is_broken: Tensor) -> Tensor:
    """Token id of each row: int64 [num_seqs]; BROKEN or NO_TOKEN where there is none."""
    is_dead = is_broken
    if plan.changes_logits:
        is_dead = is_broken | (logits.amax(dim=-1) == -torch.inf)
    if logits.device.type != "cpu" or is_dead.any():  # only the CPU knows without waiting
        logits.masked_fill_(is_dead[:, None], 0.0)
    token_ids = _pick(plan, logits)
    return token_ids.masked_fill_(is_dead, NO_TOKEN).masked_fill_(is_broken, BROKEN)


def _pick(plan: _Plan, logits: Tensor) -> Tensor:
    """Token id of each row, whose largest logit is finite: int64 [num_seqs]."""
    if not plan.drawn_rows:
        return greedy(logits)
    assert plan.seeds is not None and plan.temperature is not None
    assert plan.drawn_index is not None and plan.greedy_index is not None
    positions = [plan.num_output_tokens(row) for row in plan.drawn_rows]
    noise = to_device(uniform(plan.seeds, torch.tensor(positions)), plan.device)
    drawn = draw(
        logits[plan.drawn_index] if plan.greedy_rows else logits,
        plan.temperature,
        noise,
        min_p=plan.min_p,
        top_k=plan.top_k,
        top_p=plan.top_p,
    )
    if not plan.greedy_rows:
        return drawn
    token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=plan.device)
    token_ids[plan.drawn_index] = drawn
    token_ids[plan.greedy_index] = greedy(logits[plan.greedy_index])
    return token_ids


def _dead_row_error(is_broken: bool) -> EngineError:
    if is_broken:
        return SamplingError(
            "The model's output for this request is not finite. Check the adapter and lora_scale, "
            "or serve with --dtype bfloat16 or float32."
        )
    return NoTokenLeft(
        "No token is left to choose from: logit_bias, min_tokens and the response format or "
        "grammar exclude each other. Change one of them."
    )


def _logprobs(plan: _Plan, raw: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """top_logprobs of the rows that asked."""
    chosen = token_ids[plan.logprob_index].clamp(min=0)
    return top_logprobs(raw, chosen, plan.num_logprobs)


def _report(
    plan: _Plan, reported: list[list[Any]], token_ids: list[int]
) -> dict[int, TokenLogprobs]:
    """Row -> log-probabilities, for the rows that asked; `reported` is what _logprobs gave."""
    own, values, ids = reported
    report = {}
    for i, row in enumerate(plan.logprob_rows):
        num_top = plan.sequences[row].params.logprobs
        top = tuple(zip(ids[i][:num_top], values[i][:num_top], strict=True))
        report[row] = TokenLogprobs(token_ids[row], own[i], top)
    return report


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
