"""A prompt's tokens and those of its answer: what is served, and what has to be generated.

Public   chat_prompt, chat_turn, scored_conversation, plain_prompt, plain_turn
Prompt   what /v1/chat/completions or /v1/completions would build, token by token.
Answer   what the model generates behind it, with exactly one end token: the one that the template
         writes behind an answer, else the tokenizer's.
"""

from __future__ import annotations

import dataclasses

from server.chat_template import ChatTemplate
from server.datasets.problems import BadRecord
from server.datasets.served_model import ServedModel, TemplateInput, chat_text, encode


def chat_prompt(model: ServedModel, given: TemplateInput) -> list[int]:
    """The tokens of a conversation that the model is to go on with.

    Raises:
        BadRecord: the template refuses it.
    """
    assert model.template is not None
    text = chat_text(model.tokenizer, model.template, given, add_generation_prompt=True)
    return encode(model, text, add_special_tokens=model.template.adds_special_tokens)


def chat_turn(model: ServedModel, given: TemplateInput) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens); the last message is the answer.

    Raises:
        BadRecord: no such answer can be learnt.
    """
    template = model.template
    assert template is not None
    answer = given.messages[-1]
    if not str(answer.get("content") or "").strip() and not answer.get("tool_calls"):
        raise BadRecord("the answer is empty. Remove it, or give it the weight 0.")
    asked = dataclasses.replace(given, messages=given.messages[:-1])
    prompt = chat_text(model.tokenizer, template, asked, add_generation_prompt=True)
    whole = chat_text(model.tokenizer, template, given, add_generation_prompt=False)
    end = model.turn_ends[given.tools is not None]
    if end is None or not whole.startswith(prompt):
        raise BadRecord(unlike_prompts(template))
    body = whole[len(prompt) :].removesuffix(end)
    if not body.strip():
        raise BadRecord(f"{template.origin} writes nothing of this answer.")
    return _turn(model, prompt, body + _up_to_eos(model, end), template.adds_special_tokens)


def unlike_prompts(template: ChatTemplate) -> str:
    """Why nothing can be learnt with a template."""
    return (
        f"{template.origin} does not write answers, or not as its prompts begin them, so what the "
        f"model should generate is not known. Use another --chat-template."
    )


def scored_conversation(model: ServedModel, given: TemplateInput) -> list[int]:
    """What a reward adapter scores: its training data end in the answer's end token, and so do the
    answers of rollouts; a conversation that no answer ends is scored as the template writes it.

    Raises:
        BadRecord: the template refuses it.
    """
    template = model.template
    assert template is not None
    try:
        prompt_ids, answer_ids = chat_turn(model, given)
        return prompt_ids + answer_ids
    except BadRecord:
        text = chat_text(model.tokenizer, template, given, add_generation_prompt=False)
        return encode(model, text, add_special_tokens=template.adds_special_tokens)


def plain_prompt(model: ServedModel, prompt: str) -> list[int]:
    """The tokens of a prompt of /v1/completions."""
    token_ids = encode(model, prompt, add_special_tokens=True)
    if not token_ids and model.tokenizer.bos_token_id is not None:
        return [model.tokenizer.bos_token_id]
    return token_ids


def plain_turn(model: ServedModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens) of a text that goes on with another.

    Raises:
        BadRecord: there is nothing to learn.
    """
    if not answer.strip():
        raise BadRecord("the answer is empty. Remove the line.")
    _, answer_ids = _turn(model, prompt, answer, add_special_tokens=True)
    return plain_prompt(model, prompt), answer_ids


def _up_to_eos(model: ServedModel, text: str) -> str:
    """A text up to its first end token; nothing where it has none."""
    pieces = (model.tokenizer.piece(i).decode("utf-8", "replace") for i in model.eos_token_ids)
    stops = [text.index(piece) + len(piece) for piece in pieces if piece and piece in text]
    return text[: min(stops, default=0)]


def _turn(
    model: ServedModel, prompt: str, answer: str, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """(tokens of a text, tokens of the text that continues it, ended by exactly one end token).

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
