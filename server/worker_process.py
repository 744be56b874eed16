"""One engine worker process and its pipe.

The event loop itself reads the worker's messages, one whenever the pipe has something: with each
step there is one, and a thread between would wake twice for it. A thread writes the commands, so
that a worker in the middle of a long step never blocks the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from engine.api import Command, Shutdown
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.worker import run_worker

if TYPE_CHECKING:
    from engine.startup import LoadAdapterFiles, WriteAdapterFiles

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker process with its pipe. All is called on the event loop's thread."""

    def __init__(
        self,
        worker_args: tuple[EngineConfig, Path, LoadAdapterFiles, WriteAdapterFiles],
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[WorkerProcess, object], None],
        on_death: Callable[[WorkerProcess, str], None],
    ) -> None:
        """
        Args:
            worker_args: run_worker's, after the pipe; they are sent to another process.
            loop: the one that runs.
            on_message: with each message of the worker.
            on_death: once, with a description of the end.
        """
        context = multiprocessing.get_context("spawn")
        self._conn, child_conn = context.Pipe()
        self.process = context.Process(
            target=run_worker,
            args=(child_conn, *worker_args),
            name="engine-worker",
            daemon=True,
        )
        with _interrupts_blocked():
            self.process.start()
        child_conn.close()  # so that its end closes with the child
        self.failure: EngineError | None = None
        self.is_alive = True
        self.is_closing = False
        self._loop = loop
        self._on_message = on_message
        self._on_death = on_death
        self._outgoing: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()
        self._has_ended = asyncio.Event()
        self._report: asyncio.Task[None] | None = None
        loop.add_reader(self._conn.fileno(), self._read)

    def send(self, command: Command) -> None:
        """Queue a command; lost without a word when the worker dies, which its death then tells."""
        self._outgoing.put(command)

    async def close(self, timeout_s: float) -> None:
        """Ask the worker to end, kill it after `timeout_s`; its last messages still arrive."""
        self.is_closing = True
        self.send(Shutdown())
        await self._loop.run_in_executor(None, self._stop, timeout_s)
        await self._has_ended.wait()
        self._conn.close()
        self.process.close()

    def _stop(self, timeout_s: float) -> None:
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._outgoing.put(None)
        self._writer.join()

    def _read(self) -> None:
        """Hand one message on; at the pipe's end, say so."""
        try:
            message = self._conn.recv()  # the worker has begun to write it, and does nothing else
        except (EOFError, OSError):
            self._end()
        except Exception:  # the process boundary: what cannot be read means a broken worker
            logger.exception("A message of the engine worker could not be read.")
            self.process.kill()
            self._end()
        else:
            self._on_message(self, message)

    def _end(self) -> None:
        self._loop.remove_reader(self._conn.fileno())
        self.is_alive = False
        self._report = self._loop.create_task(self._report_death())

    async def _report_death(self) -> None:
        await self._loop.run_in_executor(None, self.process.join, 1.0)
        try:
            self._on_death(self, _describe_exit(self.process.exitcode))
        finally:
            self._has_ended.set()

    def _write(self) -> None:
        while (command := self._outgoing.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # it has gone; the reader finds out
                self._conn.send(command)


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is None:
        return "closed its pipe"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps because the machine ran out of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start a child with SIGINT blocked: it imports for seconds before it can ignore Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else starting it below would unblock SIGINT again
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
