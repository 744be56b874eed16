"""POST /v1/score: what a reward adapter's score head says of texts or of a conversation."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request
from pydantic import model_validator
from starlette.responses import Response

from engine.api import GenerateRequest, SamplingParams
from server.errors import ApiError, bad_request, from_engine, json_response
from server.generation import closable
from server.limits import body_of
from server.message_schemas import Body as RequestBody
from server.message_schemas import Message, Priority, Scale, Text
from server.prompts import chat_tokens, template_for, template_messages
from server.sampling import check_prompt, check_text
from server.state import Lease, ServerState, state_of
from server.streaming import until_gone

router = APIRouter()


class ScoreRequest(RequestBody):
    model: str
    input: Text | list[Text] | list[Message] | None = None
    messages: list[Message] | None = None
    lora_scale: Scale | None = None
    priority: Priority | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: expected either input or messages")
        if self.input == [] or self.messages == []:
            raise ValueError("input: expected at least one text or message, got an empty list")
        return self


Body = Annotated[ScoreRequest, Depends(body_of(ScoreRequest))]


@router.post("/v1/score")
async def score(request: Request, body: Body) -> Response:
    """One score per text; a conversation is one text."""
    state = state_of(request)
    is_batch = isinstance(body.input, list) and all(isinstance(text, str) for text in body.input)
    lease = state.lease(body.model, len(body.input) if is_batch and body.input else 1)
    try:
        if lease.adapter is None or not lease.adapter.info.has_score_head:
            raise bad_request(
                f"'{body.model}' has no score head. Name an adapter that was trained as a reward "
                f"model (task SEQ_CLS); see has_score_head in /v1/adapters.",
                "model",
                "no_score_head",
            )
        prompts = await asyncio.to_thread(_prompts, body, state, lease)
        scores = await until_gone(request, _scores(body, state, lease, prompts))
        num_tokens = sum(map(len, prompts))
        answer = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.fingerprint(lease.ref),
            "data": [
                {"index": index, "object": "score", "score": value}
                for index, value in enumerate(scores)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(answer, headers=lease.headers())
    finally:
        lease.release()


def _prompts(body: ScoreRequest, state: ServerState, lease: Lease) -> list[list[int]]:
    messages: list[Message] | None = body.messages
    texts: list[str] = []
    if isinstance(body.input, str):
        texts = [body.input]
    elif body.input is not None:
        texts = [text for text in body.input if isinstance(text, str)]
        messages = [entry for entry in body.input if isinstance(entry, Message)] or None
    if messages is not None:
        template = template_for(state, lease.adapter, body.model)
        prompts = [
            chat_tokens(
                template_messages(messages, template),
                template,
                state,
                add_generation_prompt=False,
                template_kwargs=body.chat_template_kwargs,
            )
        ]
    else:
        for text in texts:
            check_text(text, state.tokenizer, state.info(), "input")
        prompts = [state.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    for prompt in prompts:
        check_prompt(prompt, state.info(), "input")
    return prompts


async def _scores(
    body: ScoreRequest, state: ServerState, lease: Lease, prompts: list[list[int]]
) -> list[float]:
    tasks: list[asyncio.Task[float]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                tasks.append(group.create_task(_score(body, state, lease, prompt)))
    except* ApiError as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def _score(body: ScoreRequest, state: ServerState, lease: Lease, prompt: list[int]) -> float:
    request = GenerateRequest(
        request_id=f"score-{uuid.uuid4().hex}",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=1),
        adapter=lease.ref,
        lora_scale=1.0 if body.lora_scale is None else body.lora_scale,
        priority=body.priority or 0,
        task="score",
    )
    async with aclosing(closable(state.engine.generate(request))) as deltas:
        async for delta in deltas:
            if delta.error is not None:
                raise from_engine(delta.error)
            if delta.score is not None:
                return delta.score
    raise ApiError(503, "The server stopped the request.", code="cancelled")
