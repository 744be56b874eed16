"""Server-sent events and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
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


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def event(body: object) -> str:
    """One event. JSON has no raw line breaks, so one data line holds it."""
    return f"data: {_encode(body)}\n\n"


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
        first = await until_gone(request, feed.take(ping_interval_s))
    except BaseException:
        await feed.close()
        raise
    return StreamingResponse(
        _stream(first, feed, ping_interval_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
        # A client that leaves before the answer begins: then _stream is never entered.
        background=BackgroundTask(feed.close),
    )


class _Feed:
    """A generator of events, read in a task of its own; what it has made waits here as text."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._texts: list[str] = []
        self._has_news = asyncio.Event()
        self._error: Exception | None = None
        self._is_over = False
        self._closing: asyncio.Task[None] | None = None
        self._reading = asyncio.create_task(self._read(events))

    async def take(self, timeout_s: float) -> str:
        """All that has come since the last time, at least one event; a ping where none comes.
        Empty: nothing more will come.

        Raises:
            Exception: the generator's own, once all before it is taken.
        """
        if not self._texts and not self._is_over:
            self._has_news.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._has_news.wait()
            except TimeoutError:
                return PING
        if self._error is not None and not self._texts:
            raise self._error
        text = "".join(self._texts)
        self._texts.clear()
        return text

    async def _read(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        try:
            async with aclosing(events):
                async for body in events:
                    self._texts.append(event(body))
                    self._has_news.set()
        except Exception as error:  # whoever takes next gets it
            self._error = error
        finally:
            self._is_over = True
            self._has_news.set()

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
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


_open_closings: set[asyncio.Future[None]] = set()  # the loop itself keeps weak references only


async def _stream(first: str, feed: _Feed, ping_interval_s: float) -> AsyncIterator[str]:
    """Events as text, pings while they are silent; cancelled by Starlette when the client goes."""
    try:
        text = first
        while text:
            yield text
            try:
                text = await feed.take(ping_interval_s)
            except Exception as error:  # the status is long sent; the error is the last event
                yield event(error_body(mid_stream_error(error)))
                return
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
