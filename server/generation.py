"""Run the sequences of one HTTP request on the engine and turn their tokens into text.

A Job is what a route has prepared; `run` yields Pieces as they come, of all choices interleaved.
Closing `run` early cancels what is still running.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from engine.api import AdapterRef, GenerateRequest, RequestDelta, SamplingParams, TokenLogprobs
from server.errors import ApiError, from_engine
from server.metrics import Metrics, RequestTimer
from server.sampling import choice_seed
from server.text import AnswerText, Detokenizer
from server.tokenizer import Tokenizer


class Generates(Protocol):
    """The part of EngineClient that runs requests."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request, prepared: `num_choices` sequences for each prompt."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]
    """One per prompt: what fits depends on the prompt's length."""
    num_choices: int = 1
    adapter: AdapterRef | None = None
    lora_scale: float = 1.0
    priority: int = 0
    stops: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    continues_prompt: bool = True
    """The text goes on where the prompt ends; false for a message, which begins anew."""

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token of an answer with its log-probability and where its text begins."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True, kw_only=True)
class Piece:
    """What is new in one choice."""

    index: int
    """prompt * num_choices + choice."""
    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens generated since the last piece, those without text included."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or token that ended the text."""
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


def run(
    engine: Generates, tokenizer: Tokenizer, job: Job, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    """Pieces of all sequences as they come; each sequence ends with one that has a finish_reason.

    Raises:
        ApiError: the engine refused or lost a sequence; the others are cancelled.
    """
    sequences = [
        _sequence(engine, tokenizer, job, index, metrics) for index in range(job.num_sequences)
    ]
    return sequences[0] if len(sequences) == 1 else _merge(sequences)


async def _sequence(
    engine: Generates, tokenizer: Tokenizer, job: Job, index: int, metrics: Metrics
) -> AsyncGenerator[Piece, None]:
    prompt_index, choice = divmod(index, job.num_choices)
    prompt, params = job.prompts[prompt_index], job.params[prompt_index]
    request = GenerateRequest(
        request_id=f"{job.request_id}-{index}-{uuid.uuid4().hex[:8]}",
        prompt_token_ids=prompt,
        params=dataclasses.replace(params, seed=choice_seed(params.seed, choice)),
        adapter=job.adapter,
        lora_scale=job.lora_scale,
        priority=job.priority,
    )
    answer = AnswerText(
        Detokenizer(
            tokenizer,
            prompt_token_ids=prompt if job.continues_prompt else (),
            skip_special_tokens=job.skip_special_tokens,
        ),
        job.stops,
        min_tokens=params.min_tokens,
    )
    timer = RequestTimer(metrics, job.adapter.name if job.adapter else "", len(prompt))
    unplaced: deque[TokenLogprobs] = deque()
    try:
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                timer.tokens(len(delta.token_ids), delta.queued_s)
                if delta.finish_reason == "error":
                    assert delta.error is not None
                    raise from_engine(delta.error)
                if delta.finish_reason == "cancelled":
                    raise ApiError(503, "The server is shutting down.", code="shutting_down")
                piece = _read(delta, index, answer, unplaced, params.stop_token_ids)
                if piece.finish_reason is not None:
                    timer.end(piece.finish_reason)
                    yield piece
                    return
                yield piece
        raise ApiError(500, "The engine ended a request without an answer.", code="engine_error")
    except ApiError:
        timer.end("error")
        raise
    finally:
        timer.end("cancelled")


def _read(
    delta: RequestDelta,
    index: int,
    answer: AnswerText,
    unplaced: deque[TokenLogprobs],
    stop_token_ids: Collection[int],
) -> Piece:
    """One delta's tokens as text; the token that stops the text adds none."""
    piece = Piece(
        index=index,
        num_cached_tokens=delta.num_cached_tokens,
        prompt_logprobs=delta.prompt_logprobs,
    )
    texts, spans = [], []
    token_ids: Sequence[int] = delta.token_ids
    if delta.stop_token_id is not None:
        token_ids = token_ids[:-1]
    for position, token_id in enumerate(token_ids):
        if delta.logprobs is not None:
            unplaced.append(delta.logprobs[position])
        text, new_spans = answer.push(token_id)
        texts.append(text)
        spans += new_spans
        if answer.stop is not None:
            piece.num_tokens = position + 1
            piece.finish_reason, piece.stop_reason = "stop", answer.stop
            break
    else:
        piece.num_tokens = len(delta.token_ids)
        piece.finish_reason = delta.finish_reason
        # As in vLLM: the model's own end is no reason worth naming.
        asked_for = delta.stop_token_id in stop_token_ids
        piece.stop_reason = delta.stop_token_id if asked_for else None
    if piece.finish_reason is not None:
        text, new_spans = answer.finish()
        texts.append(text)
        spans += new_spans
        if answer.stop is not None:  # complete with the last character of all
            piece.finish_reason, piece.stop_reason = "stop", answer.stop
    piece.text = "".join(texts)
    if unplaced or delta.logprobs is not None:
        piece.tokens = [TokenInfo(unplaced.popleft(), span.start) for span in spans]
    return piece


async def _merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all sources in the order they come; the first error ends all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except ApiError as error:
            queue.put_nowait(error)
        except Exception as error:  # handed to the request's own boundary, never lost in a task
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(source)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
