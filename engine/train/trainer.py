"""One training job, from its data to the folder `final`: a generator that stops between slices.

The order of things at step k: evaluate where it is due, save where it is due, end or train the next
step. Each asks whether it has been done for k already, so that a job which goes on from the
checkpoint of step k does exactly what it would have done without the interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

import torch

from engine.api import (
    AdapterRef,
    TrainingEnded,
    TrainingJob,
    TrainingProgress,
    TrainingStarted,
)
from engine.lora import LoraWeights
from engine.model import CausalLM
from engine.train.answers import Answers, Rollouts
from engine.train.checkpoint import WriteAdapter
from engine.train.checkpoint_keeper import CheckpointKeeper, in_thread
from engine.train.evaluation import evaluate
from engine.train.optimizer_step import train_step
from engine.train.preparation import prepare
from engine.train.run import Run, Slices

StopStatus = Literal["paused", "cancelled"]


class _Stopped(Exception):
    """stop() was called: leave what is under way."""


class Trainer:
    """One job; run() is called once."""

    def __init__(
        self,
        job: TrainingJob,
        model: CausalLM,
        *,
        base_fingerprint: str,
        max_model_len: int,
        load_adapter: Callable[[AdapterRef], LoraWeights],
        write_adapter: WriteAdapter,
        rollouts: Rollouts | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            job:              what to train; where its folder holds a checkpoint it goes on there.
            model:            the base; it is read, never changed.
            base_fingerprint: named in the adapters that are written.
            max_model_len:    tokens that the base is served with.
            load_adapter:     reads an adapter from disk; called in a thread.
            write_adapter:    writes one; called in a thread.
            rollouts:         for grpo.
            clock:            seconds.
        """
        self._job = job
        self._model = model
        self._base_fingerprint = base_fingerprint
        self._max_model_len = max_model_len
        self._load_adapter = load_adapter
        self._rollouts = rollouts
        self._clock = clock
        self._keeper = CheckpointKeeper(Path(job.folder), write_adapter)
        self._stop_status: StopStatus | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next slice could only find that its rollouts are not there yet."""
        return (
            self._rollouts is not None and self._rollouts.is_waiting and self._stop_status is None
        )

    def stop(self, status: StopStatus) -> None:
        """End before the next micro-batch, with a checkpoint of the last whole step."""
        self._stop_status = status

    def weights_at(self, path: str) -> LoraWeights | None:
        """The weights that a TrainingCheckpoint or TrainingEnded says are in this folder; None
        where they are on the disk only.
        """
        return self._keeper.weights_at(path)

    def run(self) -> Slices[None]:
        """Train. Yields None between slices and events as they happen; the last is a TrainingEnded.

        Raises:
            EngineError: the job cannot be run.
            RuntimeError: whatever the device says.
        """
        run, notes = yield from in_thread(self._prepare)
        self._keeper.resume_at(run.state.step)
        yield TrainingStarted(
            job_id=self._job.job_id,
            config=run.config,
            num_steps=run.num_steps,
            num_samples=run.dataset.num_samples,
            step=run.state.step,
            num_trainable_parameters=run.adapter.num_parameters,
        )
        for note in notes:
            yield run.note("info", note)
        if run.state.step:
            yield self._keeper.event(run)  # who was killed meanwhile may not have heard of it
        try:
            yield from self._loop(run)
            path = yield from self._keeper.publish(run, self._check_stop)
        except _Stopped:
            if run.state.step != self._keeper.saved_step:
                yield from self._keeper.save(run)
            assert self._stop_status is not None
            yield self._ended(run, self._stop_status)
            return
        yield self._ended(run, "succeeded", str(path))

    def _prepare(self) -> tuple[Run, list[str]]:
        # Autograd's first call imports for a second: here, in a thread, and not in a slice.
        x = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(2 * x, x, torch.ones(1))
        return prepare(
            self._job,
            self._model,
            base_fingerprint=self._base_fingerprint,
            max_model_len=self._max_model_len,
            load_adapter=self._load_adapter,
        )

    def _loop(self, run: Run) -> Slices[None]:
        """Everything between the start and the result."""
        started_s, first_step = self._clock(), run.state.step
        has_news = False
        while True:
            if run.evaluation_is_due:
                yield from evaluate(run, self._draw, self._check_stop)
                has_news = True
            if has_news:
                per_step_s = (self._clock() - started_s) / max(1, run.state.step - first_step)
                yield self._progress(run, per_step_s)
            yield from self._keeper.save_if_due(run, self._check_stop)
            if run.is_finished:
                return
            self._check_stop()
            yield from train_step(run, self._draw, self._check_stop, self._clock)
            has_news = True

    def _draw(
        self, run: Run, prompts: list[list[int]], *, is_evaluation: bool
    ) -> Generator[None, None, Answers]:
        """Have prompts answered by the policy as it is; gives up as soon as the job is stopped."""
        assert self._rollouts is not None and self._job.reward_adapter is not None
        policy = yield from in_thread(run.weights)
        slices = self._rollouts.draw(
            policy,
            prompts,
            config=run.config,
            reward_adapter=self._job.reward_adapter,
            step=run.state.step,
            is_evaluation=is_evaluation,
        )
        try:
            while True:
                self._check_stop()
                try:
                    next(slices)
                except StopIteration as end:
                    answers: Answers = end.value
                    return answers
                yield
        finally:
            slices.close()

    def _check_stop(self) -> None:
        if self._stop_status is not None:
            raise _Stopped

    def _progress(self, run: Run, per_step_s: float) -> TrainingProgress:
        state = run.state
        return TrainingProgress(
            job_id=self._job.job_id,
            step=state.step,
            num_steps=run.num_steps,
            trained_tokens=state.trained_tokens,
            metrics=state.metrics,
            remaining_s=per_step_s * (run.num_steps - state.step),
        )

    def _ended(
        self,
        run: Run,
        status: Literal["succeeded", "cancelled", "paused"],
        path: str | None = None,
    ) -> TrainingEnded:
        return TrainingEnded(
            job_id=self._job.job_id,
            status=status,
            step=run.state.step,
            trained_tokens=run.state.trained_tokens,
            path=path,
        )
