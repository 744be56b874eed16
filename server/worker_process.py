"""One engine worker process, its pipe and the two threads that serve it.

One thread reads the worker's messages and hands them to the event loop, the other writes commands,
so that a worker in the middle of a long step never blocks the loop.
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
    """One worker process with its pipe and the two threads that serve it."""

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
            loop: on which the two callbacks are called.
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
        self._threads = [
            threading.Thread(target=self._read, name="engine-reader", daemon=True),
            threading.Thread(target=self._write, name="engine-writer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def send(self, command: Command) -> None:
        """Queue a command; lost without a word when the worker dies, which its death then tells."""
        self._outgoing.put(command)

    async def close(self, timeout_s: float) -> None:
        """Ask the worker to end, kill it after `timeout_s`; its last messages still arrive."""
        self.is_closing = True
        self.send(Shutdown())
        await asyncio.get_running_loop().run_in_executor(None, self._join, timeout_s)
        await asyncio.sleep(0)  # what the reader handed over last

    def _join(self, timeout_s: float) -> None:
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._outgoing.put(None)
        for thread in self._threads:
            thread.join()
        self._conn.close()
        self.process.close()

    def _read(self) -> None:
        """Hand the worker's messages to the loop until its end of the pipe closes."""
        try:
            while True:
                self._call(self._on_message, self._conn.recv())
        except (EOFError, OSError):
            pass
        except (
            Exception
        ):  # the process boundary: a message that cannot be read means a broken worker
            logger.exception("A message of the engine worker could not be read.")
            self.process.kill()
        self.is_alive = False
        self.process.join(1.0)
        self._call(self._on_death, _describe_exit(self.process.exitcode))

    def _write(self) -> None:
        while (command := self._outgoing.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # it has gone; the reader finds out
                self._conn.send(command)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, self, *args)


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
