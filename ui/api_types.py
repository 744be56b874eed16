"""What the API says, as the page's own types.

Public   ApiError, ModelCard, Sampling, Piece, Visitor, read_event, read_error
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx


class ApiError(Exception):
    """The API refused or failed; `code` is the API's own where it sent one."""

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        """HTTP status; None when no reply came or it failed after it had begun."""

    @property
    def wants_key(self) -> bool:
        """Whether an API key (or another one) would help."""
        return self.status in (401, 403)

    @property
    def lacks_chat_template(self) -> bool:
        """Whether the model can only continue text."""
        return self.code == "no_chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One name that the API answers to: the base model, or an adapter on it."""

    name: str
    parent: str | None = None
    """The base model's name; None for the base itself."""
    max_model_len: int | None = None
    """Tokens that prompt and answer may have together, where the API tells."""
    generation: int | None = None
    """Which publication of the adapter answers now, where the API tells."""
    scores: bool = False
    """It judges answers and gives none."""

    @property
    def title(self) -> str:
        """The name with what a reader needs in order to choose."""
        if self.parent is None:
            return f"{self.name} (base)"
        return self.name if self.generation is None else f"{self.name} · gen {self.generation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens, under the API's names and with its meanings."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a request body; a seed that is not set is left out."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one event of a stream added."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    """Tokens of the whole answer, in the last piece only."""
    generation: int | None = None
    """Which generation of the adapter answers, in the first piece only."""
    response_id: str | None = None
    """By which the answer can be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Whose wish a call to the API is."""

    key: str | None = None
    address: str | None = None
    """Handed on, because without any key the API lets only its own machine change it: the page's
    calls must not pass for those of the machine that serves it."""


def read_event(event: dict[str, Any]) -> Piece:
    """One event of a chat or completion stream; only its first choice, for one is asked for."""
    if error := event.get("error"):
        raise ApiError(str(error.get("message", error)), code=error.get("code"))
    usage = event.get("usage") or {}
    choice: dict[str, Any] = next(iter(event.get("choices", [])), {})
    text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return Piece(
        text=text or "",
        finish_reason=choice.get("finish_reason"),
        num_tokens=usage.get("completion_tokens"),
        response_id=event.get("id"),
    )


def read_error(response: httpx.Response) -> ApiError:
    """An error reply in OpenAI's shape, or whatever the server sent instead."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = response.text.strip()[:300] or response.reason_phrase, None
    if response.status_code == 503 and (wait_s := response.headers.get("retry-after")):
        message += f" (Try again in {wait_s} s.)"
    return ApiError(message, code=code, status=response.status_code)
