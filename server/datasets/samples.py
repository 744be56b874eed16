"""What every format is turned into: conversations, plain texts, and pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.datasets.problems import BadRecord
from server.errors import from_validation
from server.message_schemas import Message, Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, as /v1/chat/completions takes it."""

    messages: tuple[Message, ...]
    weights: tuple[float, ...]
    """One per message; what is not the assistant's has 0."""
    tools: tuple[dict[str, Any], ...] = ()
    """In OpenAI's shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Text as it is, without the chat template, as /v1/completions takes it."""

    prompt: str
    answer: str
    """What is learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A better and a worse answer, each with all that precedes it."""

    chosen: Chat | Plain
    rejected: Chat | Plain


Sample = Chat | Plain | Pair


def conversation(turns: Sequence[tuple[str, str]]) -> Chat:
    """(role, text) of each message; the assistant's are learnt."""
    return Chat(
        messages=tuple(
            message({"role": role, "content": content}, f"turn {index}")
            for index, (role, content) in enumerate(turns)
        ),
        weights=tuple(float(role == "assistant") for role, _ in turns),
    )


def message(fields: Mapping[str, Any], where: str) -> Message:
    """One message, checked as a request's would be.

    Raises:
        BadRecord: it is none; `where` says which.
    """
    try:
        return Message.model_validate(dict(fields))
    except ValidationError as error:
        raise BadRecord(f"{where}: {from_validation(error).message}.") from error


def tool(fields: object, where: str) -> dict[str, Any]:
    """One tool, checked as a request's would be.

    Raises:
        BadRecord: it is none.
    """
    try:
        return Tool.model_validate(fields).model_dump(exclude_none=True)
    except ValidationError as error:
        raise BadRecord(f"{where}: {from_validation(error).message}.") from error


def text(record: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field that holds text.

    Raises:
        BadRecord: it does not, or it is missing and has no default.
    """
    value = record.get(name, default)
    require(isinstance(value, str), name, "a text", value)
    assert isinstance(value, str)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRecord(f"{name}: half a surrogate pair, which is not valid Unicode.")
    return value


def objects(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A field that holds a list of objects, at least one.

    Raises:
        BadRecord: it does not.
    """
    value = record.get(name)
    require(isinstance(value, list) and value, name, "a list with at least one object", value)
    assert isinstance(value, list)
    for index, entry in enumerate(value):
        require(isinstance(entry, dict), f"{name}[{index}]", "an object", entry)
    return value


def require(condition: object, where: str, expected: str, found: object) -> None:
    """Refuse the record, naming the field, unless the condition holds."""
    if not condition:
        shown = "nothing" if found is None else repr(found)
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise BadRecord(f"{where}: expected {expected}, got {shown}.")
