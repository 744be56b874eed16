"""The worker's one training job: run slice by slice between the engine's steps, never beside them.

While no stream waits for its next token, slices run back to back and the caller looks at its pipe
between them. While streams run, slices take what the stall budget allows after each step. What a
slice takes is learnt for each place at which the trainer's generator stops.

A job's failure ends the job, never the worker; only a lost device does, and then the next worker
resumes the job from its last checkpoint.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Literal, Protocol

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
from engine.train.checkpoint_keeper import in_thread
from engine.train.out_of_memory import with_smaller_batches
from engine.train.rollouts import EngineRollouts
from engine.train.run import Slices
from engine.train.slices import Pace, is_at, is_inside, suspended_at
from engine.train.stall_budget import StallBudget

logger = logging.getLogger(__name__)

FATAL = (torch.AcceleratorError, KeyboardInterrupt, SystemExit)
"""After these nothing in this process can be trusted or is wanted."""

MANY_LONG_SLICES = 8
LONG_SHARE = 0.01
"""More than so many slices, and a larger share of them, must have been too long to be told of."""


class Trainer(Protocol):
    """One job as the runner sees it; engine/train/trainer.py, or a fake in tests."""

    def run(self) -> Slices[None]:
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
        self._pace = Pace(device)
        self._job: TrainingJob | None = None
        self._trainer: Trainer | None = None
        self._slices: Slices[None] | None = None
        self._said: list[TrainingEvent | StepOutput] = []
        self._max_rollout_tokens = 1
        self._num_slices = self._num_long_slices = 0
        self._has_told_of_stalls = False

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
        self._num_slices = self._num_long_slices = 0
        self._has_told_of_stalls = False

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
        take part where no client has any; else advance() runs them. While a job runs no step is in
        flight when slices begin: what those take is measured."""
        return self._rollouts.step(may_run_ahead=not self.is_running)

    def make_room(self) -> bool:
        """Have the trainer give up the micro-batch that it is in the middle of, for a step that
        finds no memory; whether there was one. It goes on as if its own memory had run out: with
        smaller ones."""
        if self._slices is None or not is_inside(with_smaller_batches, self._slices):
            return False
        error = torch.OutOfMemoryError("The streams needed the memory.")
        self._note(functools.partial(self._slices.throw, error))
        return True

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
            kind = suspended_at(self._slices)
            if not self._budget.may_run(kind):
                return
            started_s = self._clock()
            self._slice()
            self._pace.wait()
            elapsed_s = self._clock() - started_s
            self._budget.pay(kind, elapsed_s)
            if self._slices is None:
                return
            self._tell_of_stalls(elapsed_s)
            if is_at(in_thread, self._slices):
                return  # data are read or a checkpoint is written: more slices would only wait

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
            elif (
                elapsed_s < self._budget.max_stall_s / 4
                and output.stats.num_step_tokens == self._max_rollout_tokens
            ):
                self._max_rollout_tokens *= 2

    def _slice(self) -> None:
        """Run to where the trainer stops next."""
        assert self._slices is not None
        self._note(functools.partial(next, self._slices))

    def _note(self, go_on: Callable[[], TrainingEvent | None]) -> None:
        """Let the trainer go on and keep what it has to say."""
        assert self._slices is not None and self._job is not None
        try:
            event = go_on()
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
            torch.cuda.empty_cache()  # what the job held, for the streams

    def _tell_of_stalls(self, elapsed_s: float) -> None:
        """Say once per job that slices are longer than streams are meant to wait."""
        self._num_slices += 1
        self._num_long_slices += elapsed_s > self._budget.max_stall_s
        is_often = self._num_long_slices > max(MANY_LONG_SLICES, LONG_SHARE * self._num_slices)
        if not is_often or self._has_told_of_stalls:
            return
        self._has_told_of_stalls = True
        assert self._job is not None
        message = (
            f"Parts of a training step take {elapsed_s * 1e3:.0f} ms and cannot be divided; "
            f"--train-max-stall-ms is {self._budget.max_stall_s * 1e3:.0f}. Streams wait that long "
            f"for some of their tokens. A smaller micro_batch_tokens makes them shorter."
        )
        self._said.append(TrainingNote(job_id=self._job.job_id, level="warn", message=message))


def _failed(job: TrainingJob, error: Exception) -> TrainingEnded:
    """The last word on a job that has raised."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        error = NotEnoughMemory(f"Training ran out of memory: {error}")
    if isinstance(error, EngineError):
        info = error.info()
    else:
        logger.error("Job %s failed.", job.job_id, exc_info=error)
        message = f"Training failed: {type(error).__name__}: {error}"
        info = ErrorInfo(code=EngineError.code, message=message)
    return TrainingEnded(job_id=job.job_id, status="failed", error=info)
