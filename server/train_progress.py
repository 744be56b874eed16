"""What a person sees of serve.py train: bars, notes, and an end when it is asked for."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

from engine.api import (
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEvent,
    TrainingNote,
    TrainingProgress,
    TrainingStarted,
)
from engine.startup import Progress
from engine.train.trainer import Trainer

T = TypeVar("T")
SHOWN_METRICS = ("train_loss", "valid_loss", "reward", "accuracy", "tokens_per_s")


def follow(trainer: Trainer, events: Iterator[TrainingEvent]) -> TrainingEnded:
    """Show a job's progress until it ends; Ctrl-C and SIGTERM end it early."""

    def stop(number: int, _frame: FrameType | None) -> None:
        trainer.stop("paused")
        signal.signal(number, signal.default_int_handler)
        tqdm.write("Saving a checkpoint; once more ends at once.", file=sys.stderr)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(unit="step") as bar:
            for event in events:
                if isinstance(event, TrainingEnded):
                    return event
                _show(bar, event)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise AssertionError("a job without an end")


def _show(bar: Any, event: TrainingEvent) -> None:
    if isinstance(event, TrainingStarted):
        bar.total = event.num_steps
        bar.initial = event.step
        bar.n = event.step
        parameters = f"{event.num_trainable_parameters:,} parameters"
        bar.write(f"Training {parameters} for {event.num_steps} steps.", file=sys.stderr)
        bar.refresh()
    elif isinstance(event, TrainingProgress):
        bar.update(event.step - bar.n)
        metrics = dict(event.metrics)
        shown = {name: f"{metrics[name]:.4g}" for name in SHOWN_METRICS if name in metrics}
        bar.set_postfix(shown)
    elif isinstance(event, TrainingNote):
        bar.write(f"{event.level}: {event.message}", file=sys.stderr)
    elif isinstance(event, TrainingCheckpoint):
        best = ", the best so far" if event.is_best else ""
        bar.write(f"step {event.step}: saved {event.path}{best}", file=sys.stderr)


def with_bar(load: Callable[[Progress], T]) -> T:
    """Load something under a progress bar."""
    with tqdm(unit_scale=True, leave=False) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        return load(progress)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
