"""POST /v1/chat/completions."""

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

from server.answers import Usage, chat_logprobs
from server.best_of import judge_of
from server.errors import json_response
from server.feedback import Exchange
from server.generation import Piece, TokenInfo, run
from server.prompts import ChatJob, chat_job, plain_messages
from server.schemas import ChatCompletionRequest
from server.state import Lease, ServerState, awake_body_of, state_of
from server.streaming import open_stream, until_gone
from server.tools import ToolCallParser, parse_tool_calls

router = APIRouter()
Body = Annotated[ChatCompletionRequest, Depends(awake_body_of(ChatCompletionRequest))]


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: Body) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    lease = state.lease(body.model, body.best_of or body.n or 1, body.lora_scale)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    try:
        chat = await asyncio.to_thread(chat_job, body, state, lease, request_id)
        envelope = {
            "id": request_id,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint(lease.ref),
        }
        if body.stream:
            return await open_stream(
                request,
                _events(body, state, lease, chat, envelope),
                ping_interval_s=state.config.sse_ping_interval_s,
                headers=lease.headers(),
            )
        answer = await until_gone(request, _answer(body, state, lease, chat, envelope))
        return json_response(answer, headers=lease.headers())
    except BaseException:
        lease.release()
        raise


@dataclass(slots=True)
class _Choice:
    """One choice of an answer that is not streamed."""

    text: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reward: float | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    def value(self) -> float:
        """By which best_of chooses: the reward, or how likely the model finds its answer."""
        if self.reward is not None:
            return self.reward
        total = sum(token.logprobs.logprob for token in self.tokens)
        return total / max(len(self.tokens), 1)


async def _answer(
    body: ChatCompletionRequest,
    state: ServerState,
    lease: Lease,
    chat: ChatJob,
    envelope: dict[str, Any],
) -> dict[str, Any]:
    try:
        job = chat.job
        choices = [_Choice() for _ in range(job.num_choices)]
        usage = Usage(num_prompt_tokens=len(job.prompts[0]))
        with judge_of(body, state) as judge:
            async with aclosing(run(state.engine, state.tokenizer, job, state.metrics)) as pieces:
                async for piece in pieces:
                    choices[piece.index].add(piece)
                    usage.add(piece, job.num_choices)
            if judge is not None:
                texts = [choice.text for choice in choices]
                rewards = await judge.score_answers(body, texts)
                for choice, reward in zip(choices, rewards, strict=True):
                    choice.reward = reward
    finally:
        lease.release()
    if judge is not None or len(choices) > (body.n or 1):
        choices = sorted(choices, key=_Choice.value, reverse=True)[: body.n or 1]
    _remember(body, state, lease, envelope["id"], [choice.text for choice in choices])
    return {
        **envelope,
        "object": "chat.completion",
        "choices": [
            _message(body, state, chat, index, choice) for index, choice in enumerate(choices)
        ],
        "usage": usage.to_dict(),
    }


def _message(
    body: ChatCompletionRequest, state: ServerState, chat: ChatJob, index: int, choice: _Choice
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish_reason = choice.finish_reason
    parser = chat.plan.parser()
    if parser is not None:
        message["content"], calls = parse_tool_calls(parser, choice.text)
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
    judged = {} if choice.reward is None else {"reward": choice.reward}
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(choice.tokens, state.tokenizer) if body.logprobs else None,
        "finish_reason": finish_reason,
        "stop_reason": choice.stop_reason,
        **judged,
    }


async def _events(
    body: ChatCompletionRequest,
    state: ServerState,
    lease: Lease,
    chat: ChatJob,
    envelope: dict[str, Any],
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer; the first comes with the first piece of the engine."""
    job = chat.job
    usage = Usage(num_prompt_tokens=len(job.prompts[0]))
    shows_usage = bool(body.stream_options and body.stream_options.include_usage)
    parsers = [chat.plan.parser() for _ in range(job.num_choices)]
    has_begun = [False] * job.num_choices
    texts = [""] * job.num_choices

    def chunk(choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> dict[str, Any]:
        base = {**envelope, "object": "chat.completion.chunk", "choices": choices}
        return {**base, "usage": total} if shows_usage else base

    try:
        async with aclosing(run(state.engine, state.tokenizer, job, state.metrics)) as pieces:
            async for piece in pieces:
                usage.add(piece, job.num_choices)
                texts[piece.index] += piece.text
                if not has_begun[piece.index]:
                    has_begun[piece.index] = True
                    first = {"role": "assistant", "content": ""}
                    yield chunk([_choice(piece.index, first)])
                for choice in _piece_choices(body, state, parsers[piece.index], piece):
                    yield chunk([choice])
        if shows_usage:
            yield chunk([], usage.to_dict())
    finally:
        lease.release()
        _remember(body, state, lease, envelope["id"], texts)  # a stopped answer, too


def _remember(
    body: ChatCompletionRequest,
    state: ServerState,
    lease: Lease,
    request_id: str,
    texts: list[str],
) -> None:
    """Hold the answers, as the model wrote them, in case somebody judges one."""
    messages = plain_messages(body.messages)
    if body.continue_final_message:
        begun = messages.pop()["content"]
        texts = [begun + text for text in texts]
    prompt: dict[str, Any] = {"messages": messages}
    if body.tools:
        prompt["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    exchange = Exchange(
        model=body.model,
        generation=lease.ref.generation if lease.ref is not None else None,
        prompt=prompt,
        answers=tuple(texts),
    )
    state.feedback.remember(request_id, exchange)


def _piece_choices(
    body: ChatCompletionRequest,
    state: ServerState,
    parser: ToolCallParser | None,
    piece: Piece,
) -> list[dict[str, Any]]:
    """What one piece adds, as choices of chunks: content or calls, then the end."""
    choices = []
    content, calls = piece.text, []
    if parser is not None:
        deltas = [parser.push(piece.text)]
        if piece.finish_reason is not None:
            deltas.append(parser.finish())
        content = "".join(delta.content for delta in deltas)
        calls = [call.to_dict() for delta in deltas for call in delta.tool_calls]
    logprobs = None
    if body.logprobs and piece.tokens:
        logprobs = chat_logprobs(piece.tokens, state.tokenizer)
    if content or calls or logprobs:
        delta: dict[str, Any] = {"content": content} if content or not calls else {}
        if calls:
            delta["tool_calls"] = calls
        choices.append(_choice(piece.index, delta, logprobs))
    if piece.finish_reason is not None:
        has_calls = parser is not None and parser.num_calls > 0
        reason = (
            "tool_calls" if has_calls and piece.finish_reason == "stop" else piece.finish_reason
        )
        end = _choice(piece.index, {})
        choices.append(end | {"finish_reason": reason, "stop_reason": piece.stop_reason})
    return choices


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
