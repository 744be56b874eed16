"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from server.errors import bad_request, json_response
from server.message_schemas import Body, Message, Text, TokenId, Tool, check_continuation
from server.prompts import chat_tokens, template_for, template_messages
from server.state import ServerState, awake_body_of, state_of
from server.tools import plan_tools

router = APIRouter()
FOR_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeRequest(Body):
    """vLLM's: a text, or messages through the chat template."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected either prompt or messages")
        if self.messages is not None:
            check_continuation(
                self.messages, self.continue_final_message, self.add_generation_prompt
            )
            return self
        for name in FOR_MESSAGES:
            if getattr(self, name):
                raise ValueError(f"{name}: only allowed with messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


TokenizeBody = Annotated[TokenizeRequest, Depends(awake_body_of(TokenizeRequest))]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(awake_body_of(DetokenizeRequest))]


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """A text's tokens, or those of a conversation as /v1/chat/completions would see it."""
    state = state_of(request)
    info = state.info()
    token_ids = await asyncio.to_thread(_tokens, state, body)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": info.max_model_len,
        "tokens": token_ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        pieces = [state.tokenizer.piece(token_id) for token_id in token_ids]
        answer["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    """The text of tokens, control tokens included."""
    state = state_of(request)
    state.find(body.model or state.model_names[0])
    outside = [i for i in body.tokens if i >= state.tokenizer.vocab_size]
    if outside:
        raise bad_request(
            f"tokens: token id {outside[0]} is not in the vocabulary of "
            f"{state.tokenizer.vocab_size}",
            "tokens",
        )
    text = await asyncio.to_thread(state.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response({"prompt": text})


def _tokens(state: ServerState, body: TokenizeRequest) -> list[int]:
    model = body.model or state.model_names[0]
    adapter = state.find(model)
    if body.prompt is not None:
        return state.tokenizer.encode(
            body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    assert body.messages is not None
    template = template_for(state, adapter, model)
    plan = plan_tools(
        template_messages(body.messages, template),
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None,
        template=template.text(with_tools=bool(body.tools)),
    )
    return chat_tokens(
        plan.messages,
        template,
        state,
        tools=plan.template_kwargs.get("tools"),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
        add_special_tokens=body.add_special_tokens,
    )
