"""How a model is served, which is how its training data must look: the same prompt tokens.

A prompt is what /v1/chat/completions or /v1/completions would build; an answer is what the model
has to generate after it, with the end token.
"""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What decides the tokens of prompts and answers."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    max_seq_len: int
    turn_ends: tuple[str, str] = ("", "")
    """What the template writes behind an answer, "</s>" or "<|im_end|>\\n" or nothing: without
    tools, with tools."""


def served_model(
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    max_seq_len: int,
) -> ServedModel:
    """All that is known of how a model is served."""
    ends = ("", "")
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


def _turn_end(tokenizer: Tokenizer, template: ChatTemplate, tools: Tools) -> str:
    turn = (Message(role="user", content="Question"), Message(role="assistant", content="Answer"))
    try:
        text = _render(tokenizer, template, turn, tools, add_generation_prompt=False)
    except BadRecord:  # it does not take such a conversation
        return ""
    return text.rpartition("Answer")[2]


def chat_text(
    model: ServedModel, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool
) -> str:
    """Messages through the template, as server/prompts.py does for a request.

    Raises:
        BadRecord: the template refuses them.
    """
    assert model.template is not None
    return _render(
        model.tokenizer,
        model.template,
        messages,
        tools,
        add_generation_prompt=add_generation_prompt,
    )


def _render(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        plan = plan_tools(
            template_messages(messages, template),
            tools=list(tools) or None,
            template=template.text(with_tools=bool(tools)),
        )
        return render(
            template,
            plan.messages,
            special_tokens=tokenizer.special_tokens,
            tools=plan.template_kwargs.get("tools"),
            add_generation_prompt=add_generation_prompt,
        )
    except (ApiError, RequestError) as error:
        raise BadRecord(str(error)) from error


def chat_turn(
    model: ServedModel, messages: Sequence[Message], tools: Tools
) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens with the end token); the last message is the answer.

    Raises:
        BadRecord: no such answer can be learnt.
    """
    assert model.template is not None
    if not messages[-1].text().strip() and not messages[-1].tool_calls:
        raise BadRecord("the answer is empty. Remove it, or give it the weight 0.")
    prompt = chat_text(model, messages[:-1], tools, add_generation_prompt=True)
    whole = chat_text(model, messages, tools, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise BadRecord(
            f"{model.template.origin} writes this answer in another way than its prompt begins it, "
            f"so what the model should generate is not known. Use another --chat-template."
        )
    answer = whole[len(prompt) :]
    end = model.turn_ends[bool(tools)]
    body = answer.removesuffix(end)
    if not body.strip():
        raise BadRecord(f"{model.template.origin} writes nothing of this answer.")
    end = end[: _eos_end(model, end)]
    return _answered(model, prompt, body + end, model.template.adds_special_tokens)


def plain_prompt(model: ServedModel, prompt: str) -> list[int]:
    """The tokens of a prompt of /v1/completions."""
    token_ids = encode(model, prompt, add_special_tokens=True)
    if not token_ids and model.tokenizer.bos_token_id is not None:
        return [model.tokenizer.bos_token_id]
    return token_ids


def plain_turn(model: ServedModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """As chat_turn, for a text that continues another.

    Raises:
        BadRecord: there is nothing to learn.
    """
    if not answer.strip():
        raise BadRecord("the answer is empty. Remove the line.")
    _, answer_ids = _answered(model, prompt, answer, add_special_tokens=True)
    return plain_prompt(model, prompt), answer_ids


def _eos_end(model: ServedModel, end: str) -> int:
    """Where the first end token of a text ends; 0: there is none."""
    pieces = (
        model.tokenizer.piece(token_id).decode("utf-8", "replace")
        for token_id in model.eos_token_ids
    )
    places = [end.index(piece) + len(piece) for piece in pieces if piece and piece in end]
    return min(places, default=0)


def _answered(
    model: ServedModel, prompt: str, answer: str, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """(prompt tokens, tokens of the text that continues it, ended by exactly one end token).

    Raises:
        BadRecord: the answer goes on behind an end token.
    """
    prompt_ids = encode(model, prompt, add_special_tokens=add_special_tokens)
    both = encode(model, prompt + answer, add_special_tokens=add_special_tokens)
    if both[: len(prompt_ids)] == prompt_ids:
        answer_ids = both[len(prompt_ids) :]
    else:  # a token crosses the border, but generated tokens begin behind it
        answer_ids = _encode_behind(model, answer)
    ends = [index for index, token_id in enumerate(answer_ids) if token_id in model.eos_token_ids]
    if not ends:
        return prompt_ids, [*answer_ids, _main_eos(model)]
    rest = answer_ids[ends[0] + 1 :]
    if model.tokenizer.decode(rest, skip_special_tokens=True).strip():
        shown = model.tokenizer.piece(answer_ids[ends[0]]).decode("utf-8", "replace")
        raise BadRecord(
            f"the answer goes on behind {shown!r}, where the model stops. Remove it, or split the "
            f"text there."
        )
    return prompt_ids, answer_ids[: ends[0] + 1]


def _main_eos(model: ServedModel) -> int:
    """The end token where the template writes none: the tokenizer's, if it ends answers."""
    name = model.tokenizer.special_tokens.get("eos_token", "")
    named = [i for i in model.eos_token_ids if name and model.tokenizer.piece(i) == name.encode()]
    return (named or list(model.eos_token_ids))[0]


_BEFORE = ("\n", "a", ".", "0", "é", "#")
"""Texts of which one at least does not grow together with what follows."""


def _encode_behind(model: ServedModel, text: str) -> list[int]:
    """The tokens of a text that stands behind another: no <s>, no space before it."""
    for before in _BEFORE:
        head = encode(model, before, add_special_tokens=False)
        both = encode(model, before + text, add_special_tokens=False)
        if both[: len(head)] == head:
            return both[len(head) :]
    raise BadRecord("the tokenizer joins the beginning of the answer with whatever precedes it.")


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
