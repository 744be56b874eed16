"""What a step tells about a request, and why a text ends."""

from __future__ import annotations

import time

from engine.api import FinishReason, RequestDelta, TokenLogprobs
from engine.errors import EngineError
from engine.sequence import Sequence


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


def why_it_ends(sequence: Sequence, *, is_last: bool) -> tuple[FinishReason | None, bool]:
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
