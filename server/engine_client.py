"""The worker's other end: starts the engine worker, talks to it, and starts another when it dies.

Per worker two threads: one reads its messages and hands them to the event loop, one writes
commands, so that neither a slow client nor a worker in the middle of a long step ever blocks the
loop. Per request one unbounded queue.

When the worker dies every waiting request ends with one final delta, code "engine_restarting", and
a new worker is started. MAX_DEATHS workers in a row that served for less than QUICK_DEATH_S, or
could not start at all, are taken for a fault that restarts cannot mend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.api import (
    AdapterRef,
    AdapterReply,
    CancelRequest,
    Command,
    EngineInfo,
    EngineStats,
    ErrorInfo,
    GenerateRequest,
    LoadAdapter,
    LoadProgress,
    RecordingProgress,
    RequestDelta,
    StartTraining,
    StepOutput,
    StopTraining,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    UnloadAdapter,
    WorkerFailed,
)
from engine.config import EngineConfig
from engine.errors import EngineError, WorkerDied
from server.worker_process import WorkerProcess

if TYPE_CHECKING:
    from engine.lora import LoraWeights
    from engine.startup import WriteAdapterFiles

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "restarting", "failed", "stopped"]

MAX_DEATHS = 5
QUICK_DEATH_S = 60.0
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
SHUTDOWN_S = 2.0
"""How long a worker may take to obey Shutdown before it is killed."""


class EngineClient:
    """One engine worker at a time, seen from the event loop, on whose thread all is called."""

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        load_adapter: Callable[[AdapterRef], LoraWeights],
        write_adapter: WriteAdapterFiles,
    ) -> None:
        """
        Args:
            config: passed to the worker.
            folder: of the base model.
            load_adapter: a module-level function: it is sent to another process by name.
            write_adapter: likewise; writes the folder of an adapter that is being trained.
        """
        self._config = config
        self._folder = folder
        self._load_adapter = load_adapter
        self._write_adapter = write_adapter
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.progress: LoadProgress | None = None
        self.num_restarts = 0
        self.last_error: EngineError | None = None
        """Why the last worker ended."""
        self.on_restart: Callable[[], Awaitable[None]] | None = None
        """Awaited when a new worker is ready, before requests reach it: load the adapters again."""
        self.on_training_event: Callable[[TrainingEvent], None] | None = None
        """Called with what a training job has to say. When the worker dies that is a TrainingEnded,
        failed with code "engine_restarting": started again, in on_restart or later, the job goes on
        from its last checkpoint."""
        self.on_recording: Callable[[RecordingProgress], None] | None = None
        """Called when the worker begins or ends to record a decode step."""
        self._worker: WorkerProcess | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._requests: dict[str, asyncio.Queue[RequestDelta]] = {}
        self._commands: dict[int, asyncio.Future[AdapterReply]] = {}
        self._num_commands = 0
        self._training_jobs: set[str] = set()
        self._ready_since_s: float | None = None
        self._num_quick_deaths = 0
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> EngineInfo:
        """Start the worker and wait until it is ready.

        Raises:
            EngineError: the worker's own error when it cannot start; the client is stopped then.
        """
        assert self._worker is None, "start() is called once"
        self.state = "loading"
        try:
            info = await self._launch()
            if self._worker is None or not self._worker.is_alive:
                raise self.last_error or WorkerDied(
                    "The engine worker ended as soon as it was ready."
                )
        except BaseException as error:
            if isinstance(error, EngineError):
                self.last_error = error
            self.state = "stopped"
            await self._close_worker(0.0)
            raise
        self.state = "ready"
        return info

    async def stop(self, timeout_s: float) -> None:
        """Refuse new requests, let others run for `timeout_s`, cancel the rest, end the worker."""
        self.state = "stopped"
        deadline_s = time.monotonic() + timeout_s
        is_loading = self._ready is not None and not self._ready.done()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(self._unavailable())  # start() is waiting for it
        while self._requests and self._worker is not None and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        # One that is still loading does not listen yet.
        await self._close_worker(0.0 if is_loading else SHUTDOWN_S)
        self._end_all(None)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        """What the request produces, with exactly one final delta; closing it early cancels."""
        if self.state != "ready":
            yield _error_delta(request.request_id, self._unavailable())
            return
        if request.request_id in self._requests:
            raise ValueError(f"request_id: expected a new one, got {request.request_id!r} again")
        deltas: asyncio.Queue[RequestDelta] = asyncio.Queue()
        self._requests[request.request_id] = deltas
        self._send(request)
        try:
            while True:
                delta = await deltas.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            # The final delta has removed the entry; what is still there has been abandoned.
            if self._requests.get(request.request_id) is deltas:
                del self._requests[request.request_id]
                self._send(CancelRequest(request_id=request.request_id))

    async def load_adapter(
        self, ref: AdapterRef, pinned: bool = False, from_training: str | None = None
    ) -> AdapterReply:
        """Have the worker read, check and place an adapter.

        Args:
            ref: a generation that is not loaded.
            pinned: it keeps its row until it is unloaded.
            from_training: folder that a training event has named: no disk is read where the
                trainer still has those weights.

        Raises:
            EngineError: the adapter is refused, or the worker is not there or dies meanwhile.
        """
        self._num_commands += 1
        return await self._command(
            LoadAdapter(
                command_id=self._num_commands, ref=ref, pinned=pinned, from_training=from_training
            )
        )

    async def unload_adapter(self, ref: AdapterRef) -> None:
        """Have the worker forget an adapter; returns when no request uses it any more.

        Raises:
            EngineError: the worker is not there or dies meanwhile.
        """
        self._num_commands += 1
        await self._command(UnloadAdapter(command_id=self._num_commands, ref=ref))

    def start_training(self, job: TrainingJob) -> None:
        """Have the worker train; on_training_event hears about it until a TrainingEnded. One job
        runs at a time, and one whose folder holds a checkpoint goes on from there.

        Raises:
            EngineError: the worker is not there.
        """
        if self._worker is None or self.state not in ("ready", "restarting"):
            raise self._unavailable()
        self._training_jobs.add(job.job_id)
        self._send(StartTraining(job=job))

    def stop_training(self, job_id: str, status: Literal["paused", "cancelled"]) -> None:
        """Have a job end after the step that runs, with a checkpoint; its TrainingEnded tells when
        it has. A job that does not run is left alone."""
        self._send(StopTraining(job_id=job_id, status=status))

    async def _command(self, command: LoadAdapter | UnloadAdapter) -> AdapterReply:
        if self._worker is None or self.state not in ("ready", "restarting"):
            raise self._unavailable()
        future: asyncio.Future[AdapterReply] = asyncio.get_running_loop().create_future()
        self._commands[command.command_id] = future
        self._send(command)
        try:
            reply = await future
        finally:
            self._commands.pop(command.command_id, None)
        if reply.error is not None:
            raise error_from_info(reply.error)
        return reply

    # The worker.

    async def _launch(self) -> EngineInfo:
        """Start a worker and wait until it is ready or has failed."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self.progress = None
        self._worker = WorkerProcess(
            (self._config, self._folder, self._load_adapter, self._write_adapter),
            loop,
            self._on_message,
            self._on_death,
        )
        self.info = await self._ready
        self._ready_since_s = time.monotonic()
        return self.info

    async def _close_worker(self, timeout_s: float) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.close(timeout_s)

    def _send(self, command: Command) -> None:
        if self._worker is not None:
            self._worker.send(command)

    def _on_message(self, worker: WorkerProcess, message: object) -> None:
        """Deliver one message of the worker; late and unknown ones are dropped."""
        if worker is not self._worker and not worker.is_closing:
            return
        if isinstance(message, StepOutput):
            self.stats = message.stats
            for delta in message.deltas:
                self._deliver(delta)
        elif isinstance(message, AdapterReply):
            future = self._commands.get(message.command_id)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, TrainingEvent):
            self._deliver_training_event(message)
        elif isinstance(message, LoadProgress):
            self.progress = message
        elif isinstance(message, RecordingProgress):
            if self.on_recording is not None:
                self.on_recording(message)
        elif isinstance(message, EngineInfo):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(message)
        elif isinstance(message, WorkerFailed):
            worker.failure = error_from_info(message.error)
        else:
            logger.error("The engine worker sent a message of unknown type: %r", type(message))

    def _deliver(self, delta: RequestDelta) -> None:
        if delta.finish_reason is None:
            deltas = self._requests.get(delta.request_id)
        else:
            deltas = self._requests.pop(delta.request_id, None)
        if deltas is not None:
            deltas.put_nowait(delta)

    def _deliver_training_event(self, event: TrainingEvent) -> None:
        if isinstance(event, TrainingEnded):
            self._training_jobs.discard(event.job_id)
        if self.on_training_event is not None:
            self.on_training_event(event)

    def _on_death(self, worker: WorkerProcess, description: str) -> None:
        """The worker's pipe has closed: fail whoever waits for it, and start another."""
        if worker is not self._worker:
            return
        error = worker.failure or WorkerDied(f"The engine worker {description}.")
        self.last_error = error
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)  # start() or the supervisor deals with it
            return
        if self.state not in ("ready", "restarting"):
            return
        logger.error("%s Starting a new worker.", error)
        self.state = "restarting"
        self._end_all(
            WorkerDied(
                f"The engine worker ended while this request was running: {error} "
                f"A new one is being started; send the request again."
            )
        )
        if self._supervisor is None or self._supervisor.done():
            self._supervisor = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        """Start workers until one is ready, ever more slowly; give up when they keep dying."""
        while True:
            await self._close_worker(0.0)
            self._end_all(self._unavailable())
            ready_s, self._ready_since_s = self._ready_since_s, None
            if ready_s is not None and time.monotonic() - ready_s >= QUICK_DEATH_S:
                self._num_quick_deaths = 0
            self._num_quick_deaths += 1
            if self._num_quick_deaths >= MAX_DEATHS:
                self.state = "failed"
                logger.critical(
                    "%d engine workers in a row died; giving up. Last error: %s",
                    self._num_quick_deaths,
                    self.last_error,
                )
                return
            if self._num_quick_deaths > 1:
                backoff_s = FIRST_BACKOFF_S * 2 ** (self._num_quick_deaths - 2)
                await asyncio.sleep(min(backoff_s, MAX_BACKOFF_S))
            try:
                await self._launch()
            except EngineError as error:
                logger.error("The new engine worker could not start: %s", error)
                continue
            except OSError as error:  # no process, no pipe: the machine is short of something
                self.last_error = EngineError(f"No engine worker could be started: {error}")
                logger.error("%s", self.last_error)
                continue
            worker = self._worker
            self.num_restarts += 1
            if self.on_restart is not None:
                try:
                    await self.on_restart()
                except Exception:  # the hook's boundary: adapters are also loaded when first used
                    logger.exception("Adapters could not be loaded again after a restart.")
            if worker is not None and worker.is_alive:
                self.state = "ready"
                return

    def _end_all(self, error: EngineError | None) -> None:
        """End every waiting request, command and job: with an error, or as cancelled without one.
        Jobs go on later."""
        for request_id in list(self._requests):
            if error is None:
                self._deliver(RequestDelta(request_id=request_id, finish_reason="cancelled"))
            else:
                self._deliver(_error_delta(request_id, error))
        for future in self._commands.values():
            if not future.done():
                future.set_exception(error or self._unavailable())
        lost = error or self._unavailable()
        for job_id in list(self._training_jobs):
            self._deliver_training_event(
                TrainingEnded(job_id=job_id, status="failed", error=lost.info())
            )

    def _unavailable(self) -> EngineError:
        if self.state == "failed":
            return WorkerDied(
                f"The engine has failed and was given up; restart the server. "
                f"Last error: {self.last_error}"
            )
        reasons = {
            "loading": "The engine is still loading the model; try again soon.",
            "restarting": "The engine worker is being restarted; try again in a few seconds.",
            "ready": "The engine worker has just ended; try again in a few seconds.",
            "stopped": "The server is shutting down.",
        }
        return WorkerDied(reasons[self.state])


def error_from_info(info: ErrorInfo) -> EngineError:
    """The EngineError that an ErrorInfo describes; of the base class if the code is unknown."""
    kind = _classes_by_code().get(info.code, EngineError)
    error = kind.__new__(kind)
    Exception.__init__(error, info.message)
    error.code = info.code
    error.param = info.param
    return error


def _classes_by_code() -> dict[str, type[EngineError]]:
    found: dict[str, type[EngineError]] = {}
    pending: list[type[EngineError]] = [EngineError]
    while pending:
        kind = pending.pop()
        found.setdefault(kind.code, kind)
        pending += kind.__subclasses__()
    return found


def _error_delta(request_id: str, error: EngineError) -> RequestDelta:
    return RequestDelta(request_id=request_id, finish_reason="error", error=error.info())
