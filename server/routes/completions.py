"""POST /v1/completions: the legacy API, which continues prompts as they are."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.answers import LegacyLogprobs, Usage
from server.best_of import judge_of
from server.errors import json_response
from server.generation import Job, Piece, run
from server.prompts import completion_job
from server.schemas import CompletionRequest
from server.state import Lease, ServerState, awake_body_of, state_of
from server.streaming import open_stream, until_gone
from server.text import Detokenizer

router = APIRouter()
Body = Annotated[CompletionRequest, Depends(awake_body_of(CompletionRequest))]


@router.post("/v1/completions")
async def completions(request: Request, body: Body) -> Response:
    """Continue one or more prompts."""
    state = state_of(request)
    num_choices = body.best_of or body.n or 1
    lease = state.lease(body.model, len(body.prompts()) * num_choices, body.lora_scale)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    try:
        job, texts = await asyncio.to_thread(completion_job, body, state, lease, request_id)
        choices = _Choices(body, state, job, texts)
        envelope = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint(lease.ref),
        }
        if body.stream:
            return await open_stream(
                request,
                _events(choices, lease, envelope),
                ping_interval_s=state.config.sse_ping_interval_s,
                headers=lease.headers(),
            )
        answer = await until_gone(request, _answer(choices, lease, envelope))
        return json_response(answer, headers=lease.headers())
    except BaseException:
        lease.release()
        raise


@dataclass(slots=True)
class _Choice:
    """One choice of an answer that is not streamed."""

    prompt: int
    text: str = ""
    logprobs: LegacyLogprobs = field(default_factory=LegacyLogprobs.empty)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    total_logprob: float = 0.0
    num_tokens: int = 0
    reward: float | None = None

    def value(self) -> float:
        """By which best_of chooses: the reward, or how likely the model finds its answer."""
        if self.reward is not None:
            return self.reward
        return self.total_logprob / max(self.num_tokens, 1)

    def to_dict(self, index: int, *, has_logprobs: bool) -> dict[str, Any]:
        judged = {} if self.reward is None else {"reward": self.reward}
        return {
            "index": index,
            "text": self.text,
            "logprobs": self.logprobs.to_dict() if has_logprobs else None,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            **judged,
        }


class _Choices:
    """Turns pieces into what the client sees: echo before the text, offsets, max_tokens=0."""

    def __init__(
        self, body: CompletionRequest, state: ServerState, job: Job, texts: tuple[str, ...]
    ) -> None:
        self.body, self.state, self.job = body, state, job
        self.usage = Usage(num_prompt_tokens=sum(map(len, job.prompts)))
        self._texts = texts
        self._is_echoed = [not body.echo] * job.num_sequences

    def read(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice of a chunk."""
        prompt = piece.index // self.job.num_choices
        text, start = piece.text, len(self._texts[prompt])
        logprobs = LegacyLogprobs.empty()
        if self.body.max_tokens == 0:  # the one token that the engine made is not asked for
            text, piece.tokens, piece.num_tokens = "", [], 0
            if piece.finish_reason is not None:
                piece.finish_reason, piece.stop_reason = "length", None
        if not self._is_echoed[piece.index]:
            self._is_echoed[piece.index] = True
            text = self._texts[prompt] + text
            self._add_prompt(logprobs, prompt, piece)
        logprobs.add(piece.tokens, self.state.tokenizer, start)
        self.usage.add(piece, self.job.num_choices)
        return {
            "index": piece.index,
            "text": text,
            "logprobs": logprobs.to_dict() if self.body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def prompt_text(self, prompt: int) -> str:
        """A prompt as text, whether the answer echoes it or not."""
        given = self.body.prompts()[prompt]
        if isinstance(given, str):
            return given
        return self.state.tokenizer.decode(given, skip_special_tokens=True)

    def _add_prompt(self, logprobs: LegacyLogprobs, prompt: int, piece: Piece) -> None:
        if piece.prompt_logprobs is None:
            return
        tokenizer = self.state.tokenizer
        shown = Detokenizer(tokenizer, skip_special_tokens=self.job.skip_special_tokens)
        offset = 0
        for token_id, found in zip(self.job.prompts[prompt], piece.prompt_logprobs, strict=True):
            if found is None:
                logprobs.add_first(token_id, tokenizer)
            else:
                logprobs.add_one(found, tokenizer, offset)
            offset += len(shown.push(token_id))


async def _answer(choices: _Choices, lease: Lease, envelope: dict[str, Any]) -> dict[str, Any]:
    job, body, state = choices.job, choices.body, choices.state
    found = [_Choice(prompt=index // job.num_choices) for index in range(job.num_sequences)]
    try:
        with judge_of(body, state) as judge:
            async with aclosing(run(state.engine, state.tokenizer, job, state.metrics)) as pieces:
                async for piece in pieces:
                    choice = found[piece.index]
                    choice.total_logprob += sum(token.logprobs.logprob for token in piece.tokens)
                    choice.num_tokens += len(piece.tokens)
                    new = choices.read(piece)
                    choice.text += new["text"]
                    choice.finish_reason = new["finish_reason"]
                    choice.stop_reason = new["stop_reason"]
                    for name, values in (new["logprobs"] or {}).items():
                        getattr(choice.logprobs, name).extend(values)
            if judge is not None:
                texts = [(choices.prompt_text(choice.prompt), choice.text) for choice in found]
                rewards = await judge.score_completions(texts)
                for choice, reward in zip(found, rewards, strict=True):
                    choice.reward = reward
    finally:
        lease.release()
    kept: list[_Choice] = []
    for prompt in range(len(job.prompts)):
        own = [choice for choice in found if choice.prompt == prompt]
        if judge is not None or len(own) > (body.n or 1):
            own.sort(key=_Choice.value, reverse=True)
        kept += own[: body.n or 1]
    return {
        **envelope,
        "choices": [
            choice.to_dict(index, has_logprobs=body.logprobs is not None)
            for index, choice in enumerate(kept)
        ],
        "usage": choices.usage.to_dict(),
    }


async def _events(
    choices: _Choices, lease: Lease, envelope: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer."""
    state, options = choices.state, choices.body.stream_options
    shows_usage = bool(options and options.include_usage)
    nothing = {"usage": None} if shows_usage else {}
    try:
        pieces_of = run(state.engine, state.tokenizer, choices.job, state.metrics)
        async with aclosing(pieces_of) as pieces:
            async for piece in pieces:
                choice = choices.read(piece)
                if choice["text"] or choice["finish_reason"] or piece.tokens:
                    yield {**envelope, "choices": [choice], **nothing}
        if shows_usage:
            yield {**envelope, "choices": [], "usage": choices.usage.to_dict()}
    finally:
        lease.release()
