"""When to write what a run has learnt: checkpoints as it goes, the result at its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from engine.api import TrainingCheckpoint
from engine.lora import LoraWeights
from engine.train.checkpoint import (
    DamagedCheckpoint,
    WriteAdapter,
    checkpoint_path,
    prune_checkpoints,
    publish_final,
    read_state,
    save_checkpoint,
)
from engine.train.run import Run, Slices

T = TypeVar("T")

POLL_S = 0.002
"""How long a slice waits for work that goes on in a thread."""
RETRY_S = 10
"""How long a finished run waits before it tries again to write what it has learnt."""


class CheckpointKeeper:
    """Writes in a thread, so that serving goes on; keeps the weights of what it wrote last."""

    def __init__(self, folder: Path, write_adapter: WriteAdapter) -> None:
        """
        Args:
            folder:        of the job.
            write_adapter: writes a PEFT folder; called in a thread.
        """
        self._folder = folder
        self._write_adapter = write_adapter
        self._weights: dict[str, LoraWeights] = {}
        """By folder: those of the last checkpoint, the best and the result."""
        self.saved_step = 0
        """Of the newest checkpoint on disk."""
        self._attempted_step = 0
        """Of the last attempt, successful or not."""

    def weights_at(self, path: str) -> LoraWeights | None:
        """The weights of a checkpoint or of the result, where they are in memory."""
        return self._weights.get(path)

    def resume_at(self, step: int) -> None:
        """The checkpoint of this step is on disk; 0: there is none."""
        self.saved_step = self._attempted_step = step

    def save_if_due(self, run: Run, check_stop: Callable[[], None]) -> Slices[None]:
        """Write the checkpoint that this step should have, unless that was tried already. The last
        one is waited for: without it the run would have been for nothing.

        Args:
            run:        the job.
            check_stop: called while it waits; what it raises ends that.
        """
        if run.save_is_due and self._attempted_step != run.state.step:
            yield from self.save(run, check_stop if run.is_finished else None)

    def save(self, run: Run, check_stop: Callable[[], None] | None = None) -> Slices[None]:
        """Write a checkpoint. Where that fails a note says so and the run goes on without it, or
        waits until it can be written if there is a check_stop to end that.
        """
        state = run.state
        self._attempted_step = state.step

        def write() -> tuple[Path, LoraWeights]:
            weights = run.weights()
            path = save_checkpoint(self._folder, state, weights, run.tensors(), self._write_adapter)
            keep = run.config.keep_checkpoints
            prune_checkpoints(self._folder, keep=keep, best_step=state.best_step)
            return path, weights

        try:
            if check_stop is None:
                path, weights = yield from in_thread(write)
            else:
                path, weights = yield from _until_written(run, write, check_stop)
        except OSError as error:
            if state.best_step == state.step:
                step, value = run.best_before
                run.state = dataclasses.replace(state, best_step=step, best_value=value)
            yield run.note(
                "error",
                f"The checkpoint of step {state.step} could not be written: {error}. Training goes "
                f"on and tries again at the next one; make room on the disk.",
            )
            return
        self.saved_step = state.step
        self._remember(run, str(path), weights)
        yield self.event(run)

    def event(self, run: Run) -> TrainingCheckpoint:
        """What is told of the checkpoint of the step at which the run stands."""
        state = run.state
        return TrainingCheckpoint(
            job_id=run.job.job_id,
            step=state.step,
            path=str(checkpoint_path(self._folder, state.step)),
            metrics=state.metrics,
            is_best=state.best_step == state.step,
        )

    def publish(self, run: Run, check_stop: Callable[[], None]) -> Slices[Path]:
        """Make the best checkpoint, or the last where nothing was evaluated, the result. Waits
        until it can be written; check_stop as for save_if_due.
        """
        assert self.saved_step == run.state.step, "the last checkpoint has been waited for"
        source = checkpoint_path(self._folder, run.state.step)
        if run.state.best_step is not None:
            best = checkpoint_path(self._folder, run.state.best_step)
            try:
                read_state(best)
                source = best
            except DamagedCheckpoint as error:
                message = f"{best.name}, the best, is lost: {error}. The result is {source.name}."
                yield run.note("warn", message)
        path = yield from _until_written(
            run, lambda: publish_final(self._folder, source), check_stop
        )
        weights = self._weights.get(str(source))
        if weights is not None:
            self._weights[str(path)] = weights
        return path

    def _remember(self, run: Run, path: str, weights: LoraWeights) -> None:
        """Keep the weights of this checkpoint and of the best."""
        kept = {}
        if run.state.best_step is not None:
            best = str(checkpoint_path(self._folder, run.state.best_step))
            kept = {name: known for name, known in self._weights.items() if name == best}
        self._weights = {**kept, path: weights}


def _until_written(run: Run, write: Callable[[], T], check_stop: Callable[[], None]) -> Slices[T]:
    """Write at the end of a run, as often as it takes: a full disk is told of and waited for."""
    has_told = False
    while True:
        try:
            return (yield from in_thread(write))
        except OSError as error:
            message = (
                f"The result could not be written: {error}. The job tries again every {RETRY_S} s; "
                f"make room on the disk, or cancel it."
            )
        if not has_told:
            yield run.note("error", message)
        has_told = True
        for _ in range(RETRY_S):
            check_stop()
            yield from in_thread(lambda: time.sleep(1.0))


def in_thread(work: Callable[[], T]) -> Generator[None, None, T]:
    """Do something that takes long, beside the caller; yields until it is done."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer") as thread:
        future = thread.submit(work)
        while not future.done():
            wait([future], timeout=POLL_S)
            yield
        return future.result()
