"""Answers as they grow: run several at once and say, at a bounded pace, when to draw them again.

Public   Answer, Question, answer_together
Notable  the API is read as fast as it sends, in one task per answer; drawing looks at the state
         only every DRAW_INTERVAL_S, so that the page skips states instead of falling behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from ui.api_types import ApiError, Piece, Sampling
from ui.client import Client

DRAW_INTERVAL_S = 0.05
WAIT_INTERVAL_S = 1.0
"""While nothing arrives: also the pace at which a closed page is noticed."""
MEASURABLE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one model is asked."""

    model: str
    messages: list[dict[str, str]]
    """OpenAI's messages, the last one from the user."""
    sampling: Sampling
    key: str | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer, changed in place while it streams."""

    model: str
    generation: int | None = None
    response_id: str | None = None
    """None: it cannot be judged."""
    text: str = ""
    is_continuation: bool = False
    """The model has no chat template: its text continues the user's."""
    finish_reason: str | None = None
    error: ApiError | None = None
    is_stopped: bool = False
    """Nobody wanted the rest."""
    is_done: bool = False
    num_pieces: int = 0
    num_tokens: int | None = None
    started_at: float = field(default_factory=time.monotonic)
    first_at: float | None = None
    last_at: float | None = None

    def add(self, piece: Piece) -> None:
        """Take in what the stream sent."""
        if piece.text:
            self.text += piece.text
            self.num_pieces += 1
            self.last_at = time.monotonic()
            self.first_at = self.first_at or self.last_at
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.generation = piece.generation or self.generation
        if not self.is_continuation:  # the API takes feedback on chats
            self.response_id = piece.response_id or self.response_id
        self.num_tokens = piece.num_tokens or self.num_tokens

    @property
    def token_count(self) -> int:
        """Tokens so far: the API's count once it came; until then the pieces, about one each."""
        return self.num_tokens or self.num_pieces

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token, so that queueing does not count; None before it.

        Of an answer too short to measure so (pieces may hold several tokens), over all its time.
        """
        if self.first_at is None or self.last_at is None:
            return None
        if self.last_at - self.first_at >= MEASURABLE_S:
            return (self.token_count - 1) / (self.last_at - self.first_at)
        return self.token_count / max(self.last_at - self.started_at, 1e-3)


async def answer_together(
    client: Client, questions: Sequence[Question], answers: Sequence[Answer], stop: asyncio.Event
) -> AsyncGenerator[None, None]:
    """Fill the answers concurrently; yields whenever they are worth drawing, and once at the end.

    When `stop` is set, or this generator is closed or cancelled, the connections are closed, so
    that the server stops generating. Errors end up in `Answer.error`; none is raised.
    """
    tasks = [
        asyncio.create_task(_fill(client, question, answer))
        for question, answer in zip(questions, answers, strict=True)
    ]
    try:
        drawn: list[tuple[int, bool]] = []
        drawn_at = 0.0
        while not (stop.is_set() or all(task.done() for task in tasks)):
            state = [(answer.num_pieces, answer.is_done) for answer in answers]
            if state != drawn or time.monotonic() - drawn_at >= WAIT_INTERVAL_S:
                drawn, drawn_at = state, time.monotonic()
                yield
            await asyncio.wait(tasks, timeout=DRAW_INTERVAL_S)  # until all are done, at most
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    yield


async def _fill(client: Client, question: Question, answer: Answer) -> None:
    """Chat, or let a model without a chat template continue the user's text."""
    try:
        try:
            async for piece in client.chat(
                question.model, question.messages, question.sampling, question.key
            ):
                answer.add(piece)
        except ApiError as error:
            if not error.lacks_chat_template:
                raise
            answer.is_continuation = True
            prompt = question.messages[-1]["content"]
            async for piece in client.complete(
                question.model, prompt, question.sampling, question.key
            ):
                answer.add(piece)
    except ApiError as error:
        answer.error = error
    except asyncio.CancelledError:
        answer.is_stopped = True
        raise
    finally:
        answer.is_done = True
