"""The worker's one training job: run slice by slice between the engine's steps, never beside them.

While no stream waits for its next token, slices run back to back and the caller looks at its pipe
between them. While streams run, slices take what the stall budget allows after each step. What a
slice takes is learnt for each place at which the trainer's generator stops.

A job's failure ends the job, never the worker; only a lost device does, and then the next worker
resumes the job from its last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Hashable
from types import GeneratorType
from typing import Any, Literal, Protocol

import torch

from engine.api import (
    ErrorInfo,
    LoadAdapter,
    StepOutput,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingNote,
)
from engine.errors import EngineError, NotEnoughMemory
from engine.lora import LoraWeights
from engine.lora_source import LoraSource
from engine.train.rollouts import EngineRollouts
from engine.train.stall_budget import StallBudget

logger = logging.getLogger(__name__)

FATAL = (torch.AcceleratorError, KeyboardInterrupt, SystemExit)
"""After these nothing in this process can be trusted or is wanted."""

MANY_LONG_SLICES = 20
"""So often a slice must have waited for more than one step of the streams before it is told."""


class Trainer(Protocol):
    """One job as the runner sees it; engine/train/trainer.py, or a fake in tests."""

    def run(self) -> Generator[TrainingEvent | None, None, None]:
        """Yields None between slices and events as they happen; the last is a TrainingEnded."""
        ...

    def stop(self, status: Literal["paused", "cancelled"]) -> None:
        """End soon, with a checkpoint."""
        ...

    def weights_at(self, path: str) -> LoraWeights | None:
        """What an event says is in this folder; None where only the disk knows."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether the next slice could only find that the engine has to step first."""
        ...


class JobRunner:
    """At most one job at a time. Not thread-safe: the engine's thread calls everything."""

    def __init__(
        self,
        make_trainer: Callable[[TrainingJob], Trainer],
        rollouts: EngineRollouts,
        source: LoraSource,
        *,
        max_stall_s: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            make_trainer: puts a job's trainer together; what takes long is left to its run().
            rollouts:     what those trainers draw answers with.
            source:       where the pool's loader looks for weights that are in memory.
            max_stall_s:  how long slices may hold up streams, per step of theirs.
            device:       where training runs.
            clock:        seconds; a test's own.
        """
        self._make_trainer = make_trainer
        self._rollouts = rollouts
        self._source = source
        self._budget = StallBudget(max_stall_s)
        self._clock = clock
        self._pace = _Pace(device)
        self._job: TrainingJob | None = None
        self._trainer: Trainer | None = None
        self._slices: Generator[TrainingEvent | None, None, None] | None = None
        self._said: list[TrainingEvent | StepOutput] = []
        self._max_rollout_tokens = 1
        self._num_long_slices = 0

    @property
    def is_running(self) -> bool:
        """Whether a job has been started and has not ended."""
        return self._slices is not None

    @property
    def has_work(self) -> bool:
        """Whether advance() would get on now, rather than after further steps of the engine."""
        if self._slices is None or self._trainer is None:
            return bool(self._said)
        return not self._trainer.is_waiting

    def start(self, job: TrainingJob) -> None:
        """Begin a job, or go on with one; where another runs, this one fails."""
        if self._job is not None:
            message = f"Job {self._job.job_id} is being trained, and one job runs at a time."
            error = EngineError(f"{message} Start this one when that has ended.")
            self._said.append(_failed(job, error))
            return
        try:
            self._trainer = self._make_trainer(job)
        except Exception as error:  # the job's boundary
            self._said.append(_failed(job, error))
            return
        self._job, self._slices = job, self._trainer.run()
        self._num_long_slices = 0

    def stop(self, job_id: str, status: Literal["paused", "cancelled"]) -> None:
        """Ask a job to end; one that does not run is ignored, for it has had its last word."""
        if self._job is not None and self._job.job_id == job_id and self._trainer is not None:
            self._trainer.stop(status)

    def publish(self, command: LoadAdapter) -> None:
        """Have the pool find the weights that a job has just written, before it looks for them."""
        if command.from_training is not None and self._trainer is not None:
            weights = self._trainer.weights_at(command.from_training)
            if weights is not None:
                self._source.put(command.ref, weights, keep=False)

    def step(self) -> StepOutput:
        """The engine's next step, and what it brings for the clients. The trainer's own requests
        take part where no client has any; else advance() runs them."""
        return self._rollouts.step()

    def close(self) -> None:
        """Abandon the job without a word: another time it goes on from its last checkpoint."""
        if self._slices is not None:
            self._slices.close()
        self._slices = self._job = self._trainer = None

    def advance(self, *, has_streams: bool) -> list[TrainingEvent | StepOutput]:
        """Run slices and return what there is to say.

        Args:
            has_streams: streams wait for their next token: run what the budget allows. Else one
                slice runs.
        """
        if has_streams:
            self._budget.earn()
        if self._rollouts.are_beside_clients:
            self._draw(has_streams=has_streams)
        elif has_streams:
            self._advance_beside_streams()
        elif self.has_work and self._slices is not None:
            self._slice()
            self._pace.let_run_ahead()
        said, self._said = self._said, []
        return said

    def _advance_beside_streams(self) -> None:
        while self.has_work and self._slices is not None:
            kind = _suspended_at(self._slices)
            if not self._budget.may_run(kind):
                self._tell_of_stalls(kind)
                return
            started_s = self._clock()
            self._slice()
            self._pace.wait()
            self._budget.pay(kind, self._clock() - started_s)

    def _draw(self, *, has_streams: bool) -> None:
        """Steps of the trainer's own requests, beside clients that have some too."""
        while self._rollouts.are_beside_clients:
            kind = ("rollouts", self._max_rollout_tokens)
            if has_streams and not self._budget.may_run(kind):
                return
            started_s = self._clock()
            output = self._rollouts.own_step(self._max_rollout_tokens)
            elapsed_s = self._clock() - started_s
            if output.deltas:
                self._said.append(output)
            if not output.stats.num_step_tokens:
                return  # an adapter is being loaded
            if not has_streams:
                return
            self._budget.pay(kind, elapsed_s)
            if elapsed_s > self._budget.max_stall_s:
                self._max_rollout_tokens = max(1, self._max_rollout_tokens // 2)
            elif elapsed_s < self._budget.max_stall_s / 4:
                self._max_rollout_tokens *= 2

    def _slice(self) -> None:
        """Run to where the trainer stops next."""
        assert self._slices is not None and self._job is not None
        try:
            event = next(self._slices)
        except FATAL:
            raise
        except Exception as error:  # the job's boundary
            event = _failed(self._job, error)
        if event is None:
            return
        self._said.append(event)
        if isinstance(event, TrainingEnded):
            self._slices.close()
            self._slices = self._job = None  # the trainer stays: its weights may be asked for

    def _tell_of_stalls(self, kind: Hashable) -> None:
        """Say once per job that slices are longer than streams are meant to wait."""
        expected_s = self._budget.expected_s(kind)
        if expected_s <= self._budget.max_stall_s:
            return
        self._num_long_slices += 1
        if self._num_long_slices != MANY_LONG_SLICES:
            return
        assert self._job is not None
        message = (
            f"A part of a training step takes {expected_s * 1e3:.0f} ms and cannot be divided; "
            f"--train-max-stall-ms is {self._budget.max_stall_s * 1e3:.0f}. Streams wait that long "
            f"for some of their tokens. A smaller micro_batch_tokens makes it shorter."
        )
        self._said.append(TrainingNote(job_id=self._job.job_id, level="warn", message=message))


def _failed(job: TrainingJob, error: Exception) -> TrainingEnded:
    """The last word on a job that has raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        torch.cuda.empty_cache()  # what it held, for the streams
        error = NotEnoughMemory(f"Training ran out of memory: {error}")
    if isinstance(error, EngineError):
        info = error.info()
    else:
        logger.error("Job %s failed.", job.job_id, exc_info=error)
        message = f"Training failed: {type(error).__name__}: {error}"
        info = ErrorInfo(code=EngineError.code, message=message)
    return TrainingEnded(job_id=job.job_id, status="failed", error=info)


class _Pace:
    """How far the host may run ahead of the device: a slice is only queued when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._last: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until all that was queued has run."""
        if self._is_cuda:
            torch.cuda.synchronize()
            self._last = None

    def let_run_ahead(self) -> None:
        """Until all but the last slice has run: the device has work, a newcomer waits for one."""
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            if self._last is not None:
                self._last.synchronize()
            self._last = event


def _suspended_at(slices: Generator[TrainingEvent | None, None, None]) -> Hashable:
    """Where a generator, or the one that it delegates to, goes on: the kind of its next slice."""
    inner: Any = slices
    while isinstance(inner.gi_yieldfrom, GeneratorType):
        inner = inner.gi_yieldfrom
    return inner.gi_code, inner.gi_frame and inner.gi_frame.f_lineno
