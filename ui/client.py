"""The page's view of the API: models, health, streamed chat and completions.

Public   Client, ModelCard, Sampling, Piece, ApiError
Notable  every failure, from a refused connection to an error event in mid-stream, is one ApiError
         whose message is fit to be shown. Closing a stream early closes its connection, which is
         how the server learns that nobody waits for the answer any more.
Imports  httpx and the standard library; nothing of the other floors.
"""

from __future__ import annotations

import json
import string
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 60.0
"""Loading an adapter, or reading a long file, takes a while."""
GENERATION_HEADER = "X-Herd-Adapter-Generation"


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


class Client:
    """One connection pool to one API; the key comes with each call: every visitor has one."""

    def __init__(self, base_url: str, *, verify: bool = True) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            # A long queue or a slow model is no failure: the reader decides how long to wait.
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            # The API is this machine or one that the operator named: no proxy from the environment.
            trust_env=False,
            verify=verify,
        )

    async def why_not_ready(self) -> str | None:
        """What /health gives as the reason for not taking requests; None: it takes them.

        Raises:
            ApiError: nothing answers at all.
        """
        response = await self._get("/health", key=None)
        return None if response.status_code == 200 else str(_error(response))

    async def models(self, key: str | None) -> list[ModelCard]:
        """Every name that may be asked, the base first.

        Raises:
            ApiError: the API refuses the key, or does not answer.
        """
        response = await self._get("/v1/models", key=key)
        if response.status_code != 200:
            raise _error(response)
        try:
            cards = [
                ModelCard(
                    name=card["id"],
                    parent=card.get("parent"),
                    max_model_len=card.get("max_model_len"),
                    generation=card.get("generation"),
                )
                for card in response.json()["data"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError("The server's reply to /v1/models is not a list of models.") from error
        return sorted(cards, key=lambda card: card.parent is not None)

    def chat(
        self, model: str, messages: list[dict[str, str]], sampling: Sampling, key: str | None
    ) -> AsyncGenerator[Piece, None]:
        """Stream the answer to a conversation.

        Raises:
            ApiError: before or during the stream; see `lacks_chat_template`.
        """
        body = {"model": model, "messages": messages, **sampling.fields()}
        return self._pieces("/v1/chat/completions", body, key)

    def complete(
        self, model: str, prompt: str, sampling: Sampling, key: str | None
    ) -> AsyncGenerator[Piece, None]:
        """Stream the plain continuation of a text.

        Raises:
            ApiError: before or during the stream.
        """
        body = {"model": model, "prompt": prompt, **sampling.fields()}
        return self._pieces("/v1/completions", body, key)

    async def call(
        self,
        method: str,
        path: str,
        visitor: Visitor,
        *,
        body: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request, answered with one JSON object.

        Raises:
            ApiError: the API refuses, or does not answer.
        """
        response = await self.send(method, path, visitor, body=body, params=params)
        try:
            return dict(response.json())
        except (ValueError, TypeError) as error:
            raise ApiError(f"The server's reply to {path} is not a JSON object.") from error

    async def send(
        self,
        method: str,
        path: str,
        visitor: Visitor,
        *,
        body: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
    ) -> httpx.Response:
        """One request, answered with whatever.

        Raises:
            ApiError: the API refuses, or does not answer.
        """
        headers = _headers(visitor.key)
        if visitor.address:
            headers["X-Forwarded-For"] = visitor.address
        try:
            response = await self._http.request(
                method, path, json=body, params=params, headers=headers, timeout=CALL_TIMEOUT_S
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _error(response)
        return response

    async def _pieces(
        self, path: str, body: dict[str, Any], key: str | None
    ) -> AsyncGenerator[Piece, None]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream(
                "POST", path, json=body, headers=_headers(key)
            ) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _error(response)
                generation = response.headers.get(GENERATION_HEADER, "")
                yield Piece(generation=int(generation) if generation.isdecimal() else None)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue  # blank lines, and the comments that keep a connection alive
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    yield _piece(json.loads(data))
                raise ApiError("The connection ended in the middle of the answer. Try again.")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except json.JSONDecodeError as error:
            message = f"The server sent an event that is not JSON: {error.doc[:80]}"
            raise ApiError(message) from error

    async def _get(self, path: str, *, key: str | None) -> httpx.Response:
        try:
            return await self._http.get(path, headers=_headers(key), timeout=REPLY_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> ApiError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return ApiError(f"No server answers at {self.base_url}. Is it running?")
        if isinstance(error, httpx.TimeoutException):
            return ApiError(f"The server at {self.base_url} took too long to reply. Try again.")
        return ApiError(
            f"The connection to the server broke ({type(error).__name__}). It may be restarting: "
            "try again in a few seconds."
        )


def _headers(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    # A header carries ASCII only; let the API refuse a key with other characters, not a crash here.
    return {"Authorization": f"Bearer {quote(key, safe=string.punctuation)}"}


def _piece(event: dict[str, Any]) -> Piece:
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


def _error(response: httpx.Response) -> ApiError:
    """An error reply in OpenAI's shape, or whatever the server sent instead."""
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = response.text.strip()[:300] or response.reason_phrase, None
    if response.status_code == 503 and (wait_s := response.headers.get("retry-after")):
        message += f" (Try again in {wait_s} s.)"
    return ApiError(message, code=code, status=response.status_code)
