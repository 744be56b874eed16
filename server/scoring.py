"""Scores of texts and conversations by a reward adapter; one sequence each, all run together.

Public   lease_reward_adapter, text_tokens, completion_tokens, conversation_tokens, score_prompts
Notable  a conversation is scored as its reward adapter's own template writes it, whoever answered,
         and with the end token: the very tokens of which training makes pairs.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from engine.api import GenerateRequest, SamplingParams
from server.chat_template import ChatTemplate
from server.datasets.problems import BadRecord
from server.datasets.served_model import ServedModel, served_model, template_input
from server.datasets.turns import plain_turn, scored_conversation
from server.errors import ApiError, bad_request, from_engine
from server.message_schemas import Message
from server.prompts import chat_tokens, template_for, template_messages
from server.sampling import check_text
from server.state import Lease, ServerState


def lease_reward_adapter(
    state: ServerState, name: str, num_sequences: int, *, param: str = "model"
) -> Lease:
    """Admit the sequences to be scored and hold the adapter's current generation.

    Args:
        num_sequences: 0 where the places of a request that runs are used.
        param: the request's parameter that names the adapter.

    Raises:
        ApiError: 404 unknown, 400 without a score head, 503 not ready or queue full.
    """
    try:
        lease = state.lease(name, num_sequences)
    except ApiError as error:
        error.param = error.param and param
        raise
    if lease.adapter is None or not lease.adapter.info.has_score_head:
        lease.release()
        raise bad_request(
            f"'{name}' has no score head. Name an adapter that was trained as a reward "
            f"model (task SEQ_CLS); see has_score_head in /v1/adapters.",
            param,
            "no_score_head",
        )
    return lease


def text_tokens(text: str, state: ServerState, param: str = "input") -> list[int]:
    """A text as it is.

    Raises:
        ApiError: 400, it is far too long.
    """
    check_text(text, state.tokenizer, state.info(), param)
    return state.tokenizer.encode(text, add_special_tokens=True)


def completion_tokens(prompt: str, completion: str, state: ServerState) -> list[int]:
    """A prompt with what continues it, and the end token, as reward adapters see them in training.

    Raises:
        ApiError: 400, it is far too long.
    """
    try:
        prompt_ids, answer_ids = plain_turn(_served(state, None), prompt, completion)
    except BadRecord:  # an empty completion
        return text_tokens(prompt + completion, state, "prompt")
    return prompt_ids + answer_ids


def conversation_tokens(
    messages: Sequence[Message],
    state: ServerState,
    lease: Lease,
    *,
    tools: Sequence[dict[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """A conversation whose last answer is to be judged, as reward adapters see it in training.

    Args:
        template_kwargs: more arguments of the template; training has none.

    Raises:
        ApiError: 400, there is no template, it refuses the messages, or they are far too long.
    """
    assert lease.adapter is not None
    template = template_for(state, lease.adapter, lease.adapter.name)
    check_text(
        "".join(message.text() for message in messages), state.tokenizer, state.info(), "messages"
    )
    if template_kwargs:
        return chat_tokens(
            template_messages(messages, template),
            template,
            state,
            tools=tools,
            add_generation_prompt=False,
            template_kwargs=template_kwargs,
        )
    try:
        given = template_input(template, messages, tools)
        return scored_conversation(_served(state, template), given)
    except BadRecord as error:
        raise bad_request(str(error), "messages", "chat_template_error") from error


def _served(state: ServerState, template: ChatTemplate | None) -> ServedModel:
    info = state.info()
    return served_model(
        tokenizer=state.tokenizer,
        template=template,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        max_seq_len=info.max_model_len,
    )


async def score_prompts(
    state: ServerState,
    lease: Lease,
    prompts: Sequence[Sequence[int]],
    *,
    lora_scale: float | None = None,
    priority: int | None = None,
) -> list[float]:
    """One score per prompt.

    Raises:
        ApiError: the engine refused or lost one; the others are cancelled.
    """
    requests = [
        GenerateRequest(
            request_id=f"score-{uuid.uuid4().hex}",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(max_tokens=1),
            adapter=lease.ref,
            lora_scale=1.0 if lora_scale is None else lora_scale,
            priority=priority or 0,
            task="score",
        )
        for prompt in prompts
    ]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_score(state, request)) for request in requests]
    except* ApiError as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def _score(state: ServerState, request: GenerateRequest) -> float:
    async with aclosing(state.engine.generate(request)) as deltas:
        async for delta in deltas:
            if delta.error is not None:
                raise from_engine(delta.error)
            if delta.score is not None:
                return delta.score
    raise ApiError(503, "The server stopped the request.", code="cancelled")
