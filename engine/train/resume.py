"""Going on with a job from its newest checkpoint, if it is whole and of the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from engine.errors import EngineError
from engine.train.checkpoint import (
    DamagedCheckpoint,
    TrainerState,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_unfinished,
)
from engine.train.config import TrainConfig
from engine.train.run import Run

MAY_CHANGE = (
    "num_epochs", "max_steps", "micro_batch_tokens", "paged", "eval_every_steps",
    "save_every_steps", "keep_checkpoints", "early_stopping_patience",
)  # fmt: skip
"""What a resumed job may set anew."""


def resume(run: Run, notes: list[str]) -> bool:
    """Go to where the newest usable checkpoint stands; whether there was one.

    Args:
        run:   prepared as if it were new; its state is replaced.
        notes: what the job's owner should know is added.

    Raises:
        EngineError: the checkpoint is of another run.
    """
    folder = Path(run.job.folder)
    remove_unfinished(folder)
    for path in list_checkpoints(folder):
        try:
            state, tensors = load_checkpoint(path)
        except DamagedCheckpoint as error:
            notes.append(f"{path.name} is damaged and was passed over: {error}")
            continue
        check_same_run(state, run.state, folder)
        run.restore(tensors)
        run.state = _continued(state, run.config, run.job.config)
        notes.append(f"Going on from {path.name}.")
        _check_best(run, folder, notes)
        return True
    return False


def _continued(state: TrainerState, config: TrainConfig, given: TrainConfig) -> TrainerState:
    """A checkpoint's state under the settings of now. What the run itself has chosen for the
    micro-batches stays, for another choice would round otherwise.
    """
    before = state.config.micro_batch_tokens
    tokens = given.micro_batch_tokens or before
    config = dataclasses.replace(config, micro_batch_tokens=tokens)
    if tokens is not None and tokens != before:
        state = dataclasses.replace(state, micro_batch_tokens=tokens)
    return dataclasses.replace(state, config=config)


def _check_best(run: Run, folder: Path, notes: list[str]) -> None:
    """Forget a best checkpoint that is no more: the next evaluation finds another."""
    if run.state.best_step is None:
        return
    path = checkpoint_path(folder, run.state.best_step)
    try:
        read_state(path)
    except DamagedCheckpoint as error:
        notes.append(f"{path.name}, the best so far, is lost: {error}")
        run.state = dataclasses.replace(run.state, best_step=None, best_value=None)


def check_same_run(state: TrainerState, other: TrainerState, folder: Path) -> None:
    """Refuse to go on with other settings than those that a checkpoint was made with.

    Raises:
        EngineError: they differ in something that would make it another run.
    """
    problems = []
    if state.base_fingerprint != other.base_fingerprint:
        problems.append("the base model is another")
    if state.data_digest != other.data_digest:
        problems.append("the training data are others")
    for name in _names_that_matter():
        was, now = getattr(state.config, name), getattr(other.config, name)
        if was != now:
            problems.append(f"{name} was {was!r} and is now {now!r}")
    if problems:
        raise EngineError(
            f"{folder} holds checkpoints of another run: " + "; ".join(problems) + ". Go on with "
            "the same settings, or use another folder."
        )


def _names_that_matter() -> Iterable[str]:
    names = (field.name for field in dataclasses.fields(TrainConfig))
    return (name for name in names if name not in MAY_CHANGE)
