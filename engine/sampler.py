"""From logits to tokens: who is chosen for, how far grammars are, and what becomes of the tokens.

A sequence with drafts (engine/speculation.py) has a row more for each of them, behind its own: at
row i it is looked at as if its first i drafts had been chosen.

Launched first and finished later: launch only queues work for the device, finish reads what that
has chosen, and in between the next step's layers may be launched.

The arithmetic and its order are in kernels/sampling.py. What a batch needs is worked out when its
list of sequences changes and kept as long as it stays, which while decoding is many steps. Where an
implementation chooses tokens in one operation (on a GPU), engine/token_tables.py holds what it
needs; else the operators run one by one: engine/token_operators.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.acceptance import as_engine_error
from engine.api import GenerateRequest, SamplingParams, TokenLogprobs
from engine.errors import EngineError, GrammarError, RequestError
from engine.grammar import GrammarMatcher
from engine.sequence import Sequence
from engine.token_operators import BatchOperators, make_batch_operators
from engine.token_tables import BatchTables, TokenCounts, make_batch_tables
from engine.transfers import HostCopy, copy_to_host
from kernels.choice import BROKEN, is_fused
from kernels.dispatch import unregister

logger = logging.getLogger(__name__)


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
        found = plan.chooser.choose(logits, plan.bitmask)
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
        """Choose a token of nothing, so that kernels are compiled before a request waits for it.

        Choosing at once passed its test with a small vocabulary; where it fails with this one, the
        operators run one by one.
        """
        params = SamplingParams(max_tokens=1, temperature=1.0, top_k=2, top_p=0.5, logprobs=1)
        request = GenerateRequest(request_id="warm-up", prompt_token_ids=(0,), params=params)
        logits = torch.zeros(1, vocab_size, device=device)
        try:
            self.sample(logits, [Sequence(request, arrival=0)])
        except torch.AcceleratorError:
            raise  # the device is lost
        except Exception as error:  # compiling and launching can fail in any way
            if not is_fused(logits):
                raise
            logger.warning("choose_tokens: off, slower operators run instead: %s", error)
            unregister("choose_tokens", "triton")
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
    """What a batch needs; rows are row numbers."""

    sequences: list[Sequence]
    device: torch.device
    offsets: list[int]
    """[num_rows]: how many drafts a row takes for chosen."""
    matchers: dict[int, GrammarMatcher]
    """By row; a sequence's rows have the same."""
    bitmask: Tensor | None
    """int32 [num_grammars, words], on the CPU; None without grammars."""
    logprob_rows: list[int]
    chooser: BatchTables | BatchOperators

    @property
    def has_drafts(self) -> bool:
        return any(self.offsets)


def _make_plan(sequences: list[Sequence], logits: Tensor, counts: TokenCounts) -> _Plan:
    offsets: list[int] = []
    for row, sequence in enumerate(sequences):
        is_behind = row > 0 and sequences[row - 1] is sequence
        offsets.append(offsets[-1] + 1 if is_behind else 0)
    matchers = {row: s.grammar for row, s in enumerate(sequences) if s.grammar is not None}
    vocab_size, device = logits.shape[1], logits.device
    bitmask = None
    if matchers:
        bitmask = torch.empty((len(matchers), (vocab_size + 31) // 32), dtype=torch.int32)
    chooser: BatchTables | BatchOperators
    if is_fused(logits):
        chooser = make_batch_tables(
            list(sequences), offsets, counts, mask_rows=list(matchers), vocab_size=vocab_size,
            device=device,
        )  # fmt: skip
    else:
        chooser = make_batch_operators(
            list(sequences), offsets, mask_rows=list(matchers), device=device
        )
    return _Plan(
        sequences=list(sequences),
        device=device,
        offsets=offsets,
        matchers=matchers,
        bitmask=bitmask,
        logprob_rows=[row for row, s in enumerate(sequences) if s.params.logprobs is not None],
        chooser=chooser,
    )


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


def _report(
    plan: _Plan, reported: list[list[Any]], token_ids: list[int]
) -> dict[int, TokenLogprobs]:
    """Row -> log-probabilities, for the rows that asked; `reported` is what top_logprobs gave."""
    own, values, ids = reported
    report = {}
    for i, row in enumerate(plan.logprob_rows):
        num_top = plan.sequences[row].params.logprobs
        top = tuple(zip(ids[i][:num_top], values[i][:num_top], strict=True))
        report[row] = TokenLogprobs(token_ids[row], own[i], top)
    return report
