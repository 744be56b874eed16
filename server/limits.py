"""How much one request may send, and how much may wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, bad_request, error_response, from_validation

B = TypeVar("B", bound=BaseModel)
SMALL_BODY_BYTES = 64 * 1024
"""Bodies up to here are parsed on the event loop: a thread would take longer."""
UPLOAD_PATH = "/v1/files"
FORM_BYTES = 64 * 1024
"""Room for what is around a file in its form."""
LINGER_S = 10.0
"""How long the rest of a refused body is read. A connection that is closed while its client still
sends is reset, and most clients then lose the answer."""


class BodyLimit:
    """ASGI middleware: a body over the limit is a 413, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_file_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["method"] == "POST" and scope["path"].endswith(UPLOAD_PATH)
        error = _too_large(self._max_file_bytes if is_upload else self._max_bytes, is_upload)
        max_bytes = self._max_file_bytes + FORM_BYTES if is_upload else self._max_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > max_bytes:
            await error_response(error)(scope, receive, _lingering(receive, send))
            return
        num_bytes = 0
        lingering_send = _lingering(receive, send)

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > max_bytes:
                raise error
            return message

        async def send_to_client(message: Message) -> None:
            await (lingering_send if num_bytes > max_bytes else send)(message)

        await self._app(scope, limited, send_to_client)


def _too_large(max_bytes: int, is_upload: bool) -> ApiError:
    what, flag = ("file", "max-file") if is_upload else ("request body", "max-request")
    text = f"The {what} is larger than {max_bytes} bytes (--{flag}-bytes)."
    return ApiError(413, text, code="request_too_large")


def _lingering(receive: Receive, send: Send) -> Send:
    """A `send` that reads and drops the rest of the body before it ends the answer."""

    async def send_and_drain(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    while (await receive()).get("more_body"):
                        pass
            message = {"type": "http.response.body"}
        await send(message)

    return send_and_drain


def body_of(model: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency that reads and checks the body; anything wrong with it is a 400."""

    async def read(request: Request) -> B:
        body = await request.body()
        if len(body) <= SMALL_BODY_BYTES:
            return parse(model, body)
        return await asyncio.to_thread(parse, model, body)

    return read


def parse(model: type[B], body: bytes) -> B:
    """JSON bytes to a checked model.

    Raises:
        ApiError: 400, with the parameter at fault.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.", code="invalid_json") from None
