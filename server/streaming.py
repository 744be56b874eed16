"""Server-sent events and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.errors import EngineError
from server.errors import ApiError, error_body, from_engine, internal_error

log = logging.getLogger("herd.server")
T = TypeVar("T")
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


def event(body: object) -> str:
    """One event. JSON has no raw line breaks, so one data line holds it."""
    return (
        f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"
    )


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it as soon as the client disconnects.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def open_stream(
    request: Request,
    events: AsyncGenerator[dict[str, Any], None],
    *,
    ping_interval_s: float,
    headers: dict[str, str] | None = None,
) -> Response:
    """Answer with a stream, once there is a first event: until then an error has its own status.

    A first event that takes longer than the ping interval does not hold the headers back.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await until_gone(request, _wait(first, ping_interval_s))
        if first.done():
            first.result()  # raises what went wrong before the first event
    except BaseException:
        await _close(first, events)
        raise
    return StreamingResponse(
        _stream(first, events, ping_interval_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
    )


async def _wait(task: asyncio.Future[Any], timeout_s: float) -> None:
    await asyncio.wait({task}, timeout=timeout_s)


async def _stream(
    pending: asyncio.Future[dict[str, Any]],
    events: AsyncGenerator[dict[str, Any], None],
    ping_interval_s: float,
) -> AsyncIterator[str]:
    """Events as text, pings while they are silent; cancelled by the server when the client goes."""
    try:
        while True:
            while not pending.done():
                await asyncio.wait({pending}, timeout=ping_interval_s)
                if not pending.done():
                    yield PING
            try:
                body = pending.result()
            except StopAsyncIteration:
                break
            except Exception as error:  # the status is long sent; the error is the last event
                yield event(error_body(mid_stream_error(error)))
                return
            yield event(body)
            pending = asyncio.ensure_future(anext(events))
        yield DONE
    finally:
        # Starlette cancels every await of this task, so the closing is done by another.
        task = asyncio.ensure_future(_close(pending, events))
        _closing.add(task)
        task.add_done_callback(_closing.discard)


def mid_stream_error(error: Exception) -> ApiError:
    """What the client is told; what is not meant for it goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    log.error("a stream failed", exc_info=error)
    return internal_error()


_closing: set[asyncio.Future[None]] = set()  # the loop itself keeps weak references only


async def _close(
    pending: asyncio.Future[dict[str, Any]], events: AsyncGenerator[dict[str, Any], None]
) -> None:
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await events.aclose()
