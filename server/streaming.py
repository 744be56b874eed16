"""Server-sent events and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.background import BackgroundTask
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

    Raises:
        ClientGone: the client left before the first event.
    """
    feed = _Feed(events)
    try:
        await until_gone(request, feed.wait(ping_interval_s))
        if feed.next.done():
            feed.next.result()  # raises what went wrong before the first event
    except BaseException:
        await feed.close()
        raise
    return StreamingResponse(
        _stream(feed, ping_interval_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
        # A client that leaves before the answer begins: then _stream is never entered.
        background=BackgroundTask(feed.close),
    )


class _Feed:
    """A generator of events, its next one always being made; closed once, whoever asks first."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._events = events
        self._closing: asyncio.Task[None] | None = None
        self.next: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(anext(events))

    def advance(self) -> None:
        self.next = asyncio.ensure_future(anext(self._events))

    async def wait(self, timeout_s: float) -> None:
        await asyncio.wait({self.next}, timeout=timeout_s)

    def begin_close(self) -> asyncio.Task[None]:
        """Stop the generator, in a task of its own."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
            _open_closings.add(self._closing)
            self._closing.add_done_callback(_open_closings.discard)
        return self._closing

    async def close(self) -> None:
        """The same, and wait for it."""
        await asyncio.shield(self.begin_close())

    async def _close(self) -> None:
        self.next.cancel()
        await asyncio.gather(self.next, return_exceptions=True)
        await self._events.aclose()


_open_closings: set[asyncio.Future[None]] = set()  # the loop itself keeps weak references only


async def _stream(feed: _Feed, ping_interval_s: float) -> AsyncIterator[str]:
    """Events as text, pings while they are silent; cancelled by Starlette when the client goes."""
    try:
        while True:
            await feed.wait(ping_interval_s)
            if not feed.next.done():
                yield PING
                continue
            try:
                body = feed.next.result()
            except StopAsyncIteration:
                break
            except Exception as error:  # the status is long sent; the error is the last event
                yield event(error_body(mid_stream_error(error)))
                return
            yield event(body)
            feed.advance()
        yield DONE
    finally:
        feed.begin_close()  # not awaited: Starlette cancels every await of this task


def mid_stream_error(error: Exception) -> ApiError:
    """What the client is told; what is not meant for it goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    log.error("a stream failed", exc_info=error)
    return internal_error()
