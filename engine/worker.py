"""The engine in its own process: commands in over a pipe, one message out per step.

The loop blocks on the pipe while there is nothing to do. It ends on Shutdown, when the pipe closes,
and with the parent process, whatever became of that. Ctrl-C is the parent's to handle: the worker
ignores it.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

from engine.api import (
    CancelRequest,
    Command,
    ErrorInfo,
    GenerateRequest,
    LoadAdapter,
    LoadProgress,
    Reply,
    Shutdown,
    StartTraining,
    StopTraining,
    UnloadAdapter,
    WorkerFailed,
)
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.lora_source import LoraSource
from engine.memory import return_freed_memory
from engine.startup import (
    LoadAdapterFiles,
    Progress,
    WriteAdapterFiles,
    create_engine,
    create_runner,
)
from engine.train.runner import JobRunner
from kernels.scratch import free_scratch

logger = logging.getLogger(__name__)

LOADING_POLL_S = 0.002
"""How often to look for a finished adapter or grammar while nothing can run."""

IDLE_S = 2.0
"""After so long without work the memory of the last requests is given back."""

PROGRESS_S = 0.1
"""Least time between two progress messages of one stage."""


def run_worker(
    conn: Connection,
    config: EngineConfig,
    folder: Path,
    load_adapter: LoadAdapterFiles,
    write_adapter: WriteAdapterFiles,
) -> None:
    """Entry point of the worker process.

    Args:
        conn: commands come in, replies go out; its end is the order to stop.
        config: all flags.
        folder: of the base model.
        load_adapter: reads and checks an adapter; injected, because the engine does not import
            adapters.
        write_adapter: writes the folder of an adapter that is being trained; injected likewise.
    """
    _ignore_interrupts()
    _die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    exit_code = _run(conn, config, folder, LoraSource(load_adapter), write_adapter)
    logging.shutdown()
    # There is nothing to save, and tearing down torch can take a second that Ctrl-C would feel.
    os._exit(exit_code)


def _run(
    conn: Connection,
    config: EngineConfig,
    folder: Path,
    source: LoraSource,
    write_adapter: WriteAdapterFiles,
) -> int:
    """The worker's life; returns its exit code."""
    try:
        engine, info = create_engine(config, folder, source, _progress_sender(conn), conn.send)
        training = create_runner(config, engine, info, source, write_adapter)
        conn.send(info)
        gc.freeze()  # what is there now stays; looking through it for garbage would hold up a step
        serve(conn, engine, training)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0  # the parent has gone or has closed the pipe: nobody is left to tell
    except EngineError as error:
        _send_failure(conn, error.info())
        return 1
    except Exception as error:  # the process boundary
        logger.exception("The engine worker failed.")
        message = f"The engine worker failed: {type(error).__name__}: {error}"
        _send_failure(conn, ErrorInfo(code=EngineError.code, message=message))
        return 1
    return 0


def serve(conn: Connection, engine: Engine, training: JobRunner) -> None:
    """Take commands, run steps and train between them, until Shutdown.

    Raises:
        EOFError, OSError: the pipe is closed.
    """
    has_run, is_tidy = True, False
    while True:
        timeout_s = _patience_s(engine, training, has_run=has_run)
        if timeout_s is not None:
            is_tidy = False
        elif not is_tidy and not conn.poll(IDLE_S):
            free_scratch()
            return_freed_memory()
            is_tidy = True
        while conn.poll(timeout_s):
            command: Command = conn.recv()
            if isinstance(command, Shutdown):
                training.close()
                engine.cancel_all()
                _send_step(conn, engine, training)
                return
            _handle(engine, training, command)
            timeout_s = 0.0
        has_run = _send_step(conn, engine, training)
        for reply in training.advance(has_streams=has_run):
            conn.send(reply)


def _patience_s(engine: Engine, training: JobRunner, *, has_run: bool) -> float | None:
    """How long to wait for a command; None: until there is one."""
    if training.has_work or (has_run and engine.has_work()):
        return 0.0
    return LOADING_POLL_S if engine.has_work() or training.is_running else None


def _handle(engine: Engine, training: JobRunner, command: Command) -> None:
    """Pass one command on; a nonsensical one is logged and dropped."""
    try:
        if isinstance(command, GenerateRequest):
            engine.add(command)
        elif isinstance(command, CancelRequest):
            engine.cancel(command.request_id)
        elif isinstance(command, LoadAdapter):
            training.publish(command)
            engine.adapters.load(command)
        elif isinstance(command, UnloadAdapter):
            engine.adapters.unload(command)
        elif isinstance(command, StartTraining):
            training.start(command.job)
        elif isinstance(command, StopTraining):
            training.stop(command.job_id, command.status)
        else:
            logger.error("A message of unknown type was dropped: %r", type(command))
    except Exception:  # the process boundary
        logger.exception("A command was dropped: %r", command)


def _send_step(conn: Connection, engine: Engine, training: JobRunner) -> bool:
    """Run one step and send what it has to say; whether it ran any token."""
    output = training.step()
    replies: list[Reply] = list(engine.adapters.take_replies())
    if output.deltas or output.stats.num_step_tokens or replies:
        conn.send(output)
    for reply in replies:
        conn.send(reply)
    return output.stats.num_step_tokens > 0


def _progress_sender(conn: Connection) -> Progress:
    """Sends progress, but no more often than a person can read: loading may report each tensor."""
    last_stage, last_s = "", 0.0

    def send(stage: str, done: int, total: int) -> None:
        nonlocal last_stage, last_s
        now_s = time.monotonic()
        if stage != last_stage or done >= total or now_s - last_s > PROGRESS_S:
            last_stage, last_s = stage, now_s
            conn.send(LoadProgress(stage=stage, done=done, total=total))

    return send


def _send_failure(conn: Connection, error: ErrorInfo) -> None:
    try:
        conn.send(WorkerFailed(error=error))
    except OSError:
        logger.error("%s", error.message)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches the whole process group; we were started with SIGINT blocked until now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_parent() -> None:
    """End at once when the parent has ended, even in the middle of a long step or of loading."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
