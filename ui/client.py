"""The page's view of the API: models, health, streamed chat and completions.

Public   Client
Notable  every failure, from a refused connection to an error event in mid-stream, is one ApiError
         whose message is fit to be shown. Closing a stream early closes its connection, which is
         how the server learns that nobody waits for the answer any more.
Imports  httpx and the standard library; nothing of the other floors.
"""

from __future__ import annotations

import json
import string
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import quote

import httpx

from ui.api_types import ApiError, ModelCard, Piece, Sampling, Visitor, read_error, read_event

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 15.0
CALL_TIMEOUT_S = 60.0
"""Loading an adapter, or reading a long file, takes a while."""
GENERATION_HEADER = "X-Herd-Adapter-Generation"


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
        return None if response.status_code == 200 else str(read_error(response))

    async def models(self, key: str | None) -> list[ModelCard]:
        """Every name that may be asked, the base first.

        Raises:
            ApiError: the API refuses the key, or does not answer.
        """
        response = await self._get("/v1/models", key=key)
        if response.status_code != 200:
            raise read_error(response)
        try:
            cards = [
                ModelCard(
                    name=card["id"],
                    parent=card.get("parent"),
                    max_model_len=card.get("max_model_len"),
                    generation=card.get("generation"),
                    scores=bool(card.get("has_score_head")),
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
            raise read_error(response)
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
                    raise read_error(response)
                generation = response.headers.get(GENERATION_HEADER, "")
                yield Piece(generation=int(generation) if generation.isdecimal() else None)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue  # blank lines, and the comments that keep a connection alive
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    yield read_event(json.loads(data))
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
