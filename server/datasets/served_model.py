"""How a model is served: what decides the tokens that it reads and has to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from server.chat_template import ChatTemplate, render
from server.datasets.problems import BadRecord
from server.errors import ApiError
from server.message_schemas import Message
from server.prompts import template_messages
from server.tokenizer import Tokenizer
from server.tools import plan_tools

Tools = Sequence[dict[str, Any]]
"""In OpenAI's shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInput:
    """What a chat template is given: plain messages, and tools where it knows them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Tokenizer, template and limits."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_seq_len: int
    turn_ends: tuple[str | None, str | None] = ("", "")
    """What the template writes behind an answer, "</s>" or "<|im_end|>\\n" or nothing: without
    tools, with tools. None: it does not write answers, or not as its prompts begin them."""


def served_model(
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    max_seq_len: int,
) -> ServedModel:
    """All that is known of how a model is served."""
    ends: tuple[str | None, str | None] = ("", "")
    if template is not None:
        ends = (_turn_end(tokenizer, template, ()), _turn_end(tokenizer, template, (_ANY_TOOL,)))
    return ServedModel(
        tokenizer=tokenizer,
        template=template,
        eos_token_ids=tuple(eos_token_ids),
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        turn_ends=ends,
    )


_ANY_TOOL = {"type": "function", "function": {"name": "any", "parameters": {"type": "object"}}}


def _turn_end(tokenizer: Tokenizer, template: ChatTemplate, tools: Tools) -> str | None:
    turn = (Message(role="user", content="Question"), Message(role="assistant", content="Answer"))
    try:
        asked = template_input(template, turn[:1], tools)
        prompt = chat_text(tokenizer, template, asked, add_generation_prompt=True)
        given = template_input(template, turn, tools)
        whole = chat_text(tokenizer, template, given, add_generation_prompt=False)
    except BadRecord:  # it does not take such a conversation
        return ""
    answer = whole[len(prompt) :] if whole.startswith(prompt) else ""
    return answer.rpartition("Answer")[2] if "Answer" in answer else None


def template_input(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> TemplateInput:
    """Messages and tools as server/prompts.py gives them to the template for a request.

    Raises:
        BadRecord: a tool has a shape that is not allowed.
    """
    try:
        plan = plan_tools(
            template_messages(messages, template),
            tools=list(tools) or None,
            template=template.text(with_tools=bool(tools)),
        )
    except RequestError as error:
        raise BadRecord(str(error)) from error
    return TemplateInput(messages=plan.messages, tools=plan.template_kwargs.get("tools"))


def chat_text(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    given: TemplateInput,
    *,
    add_generation_prompt: bool,
) -> str:
    """A conversation through the template.

    Raises:
        BadRecord: the template refuses it.
    """
    try:
        return render(
            template,
            given.messages,
            special_tokens=tokenizer.special_tokens,
            tools=given.tools,
            add_generation_prompt=add_generation_prompt,
        )
    except ApiError as error:
        raise BadRecord(str(error)) from error


def encode(model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
    """The tokens of a text.

    Raises:
        BadRecord: it is far too long, so it was not tokenised.
    """
    longest = model.tokenizer.max_token_bytes
    if longest is not None and len(text) > 2 * longest * model.max_seq_len:  # see check_text
        raise BadRecord(
            f"{len(text):,} characters cannot fit in {model.max_seq_len:,} tokens, the most that a "
            f"sample may have. Shorten or split it."
        )
    return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
