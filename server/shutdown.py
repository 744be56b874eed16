"""SIGTERM drains, Ctrl-C stops at once: how the two reach a uvicorn server.

    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, ...))
    drain_on_sigterm(server, state)
    server.run()

While draining, new requests get a 503 and /health says so; running ones go on for up to
--shutdown-timeout-s. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from server.state import ServerState

log = logging.getLogger("herd.server")


def drain_on_sigterm(server: uvicorn.Server, state: ServerState) -> None:
    """Replace the server's signal handling; call before it runs."""
    tasks: list[asyncio.Task[None]] = []

    async def drain() -> None:
        timeout_s = state.config.shutdown_timeout_s
        log.info("draining: %d sequences, at most %g s", state.num_sequences, timeout_s)
        if not await state.drain(timeout_s):
            log.warning("%d sequences did not finish and are cancelled", state.num_sequences)
        await stop()

    async def stop() -> None:
        state.is_draining = True
        server.should_exit = True
        await state.engine.stop(0.0)  # ends what still runs, each with a clear error

    def handle_exit(sig: int, _frame: FrameType | None) -> None:
        # Runs between two steps of the loop's own thread.
        loop = asyncio.get_running_loop()
        if server.should_exit:  # asked again while stopping
            server.force_exit = True
            return
        is_first = not tasks
        work = drain() if sig == signal.SIGTERM and is_first else stop()
        loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(work)))

    server.handle_exit = handle_exit  # type: ignore[method-assign]
