"""What a step adds to a text, why that ends, and what is told about it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.api import FinishReason, RequestDelta, TokenLogprobs
from engine.errors import EngineError
from engine.sampler import NOT_REACHED, SampledToken
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Added:
    """What a text has got from a step."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    """Where the request asked for them."""
    reason: FinishReason | None
    """Why it ends, where it does."""
    stop_token_id: int | None
    error: EngineError | None
    """Why it cannot go on behind these tokens."""


def append_tokens(sequence: Sequence, tokens: list[SampledToken]) -> Added:
    """Append the tokens that a text comes to, up to its end.

    Args:
        sequence: its drafts stand.
        tokens: of its next position, and of those behind its drafts.
    """
    reached = [token for token in tokens if token is not NOT_REACHED]
    appended: list[SampledToken] = []
    reason: FinishReason | None = None
    is_stop_token = False
    for token in reached:
        if token.error is not None:
            break
        if appended:  # so the draft in front of this token was right
            sequence.num_computed_tokens += 1
        sequence.append(token.token_id)
        appended.append(token)
        reason, is_stop_token = _why_it_ends(sequence, is_last=token is reached[-1])
        if reason is not None:
            break
    logprobs = None
    if sequence.params.logprobs is not None:
        logprobs = tuple(token.logprobs for token in appended if token.logprobs is not None)
    return Added(
        token_ids=tuple(token.token_id for token in appended),
        logprobs=logprobs,
        reason=reason,
        stop_token_id=appended[-1].token_id if is_stop_token else None,
        error=None if reason is not None else reached[-1].error,
    )


def make_delta(
    sequence: Sequence,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] | None = None,
    *,
    finish_reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    score: float | None = None,
    error: EngineError | None = None,
) -> RequestDelta:
    """A delta; the first of a sequence also tells how it got here."""
    prompt_logprobs = None
    num_cached_tokens, queued_s = 0, 0.0
    if not sequence.has_sent_delta:
        first_s = sequence.first_scheduled_s
        queued_s = (time.perf_counter() if first_s is None else first_s) - sequence.arrival_s
        num_cached_tokens = sequence.num_cached_tokens
        if sequence.wants_prompt_logprobs and finish_reason not in ("error", "cancelled"):
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        sequence.has_sent_delta = True
    return RequestDelta(
        request_id=sequence.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=num_cached_tokens,
        queued_s=queued_s,
        score=score,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        error=error.info() if error is not None else None,
    )


def _why_it_ends(sequence: Sequence, *, is_last: bool) -> tuple[FinishReason | None, bool]:
    """Why a text ends with the token just appended, if it does, and whether that is a stop token.

    Args:
        sequence: has a token of this step.
        is_last: no other token of this step follows. The sampler has moved the grammar on by all of
            them, and none stands behind its end.
    """
    num_output_tokens = len(sequence.output_token_ids)
    is_stop_token = sequence.output_token_ids[-1] in sequence.stop_token_ids
    if is_stop_token and num_output_tokens > sequence.params.min_tokens:
        return "stop", True
    if is_last and sequence.grammar is not None and sequence.grammar.is_finished():
        return "stop", False
    if num_output_tokens >= sequence.max_tokens:
        return "length", False
    return None, False
