"""What the trainer says about a job, written down: rows, results, models.

Functions of a connection, for server/database.py to run as one transaction per batch of events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from engine.api import (
    TrainingCheckpoint,
    TrainingEvent,
    TrainingNote,
    TrainingProgress,
    TrainingStarted,
)
from server.hyperparameters import config_to_json
from server.job_store import Job, add_event, change_job, forget_steps, new_id
from server.tables import checkpoints, insert

CHECKPOINT = ":ckpt-step-"
"""Between a model's name and the step of one of its checkpoints."""
API_NAMES = {"mean_token_accuracy": "train_mean_token_accuracy"}
SHOWN_METRICS = {
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "reward": "mean reward",
}


def record(connection: sa.Connection, job: Job, events: Sequence[TrainingEvent]) -> None:
    """Write events of a job that runs; all but its TrainingEnded."""
    for event in events:
        if isinstance(event, TrainingStarted):
            _record_start(connection, job, event)
        elif isinstance(event, TrainingProgress):
            _record_step(connection, job, event)
        elif isinstance(event, TrainingCheckpoint):
            _record_checkpoint(connection, job, event)
        elif isinstance(event, TrainingNote):
            add_event(connection, job.id, event.message, level=event.level)
    progress = [event for event in events if isinstance(event, TrainingProgress)]
    if progress:
        last = progress[-1]
        change_job(
            connection,
            job.id,
            step=last.step,
            trained_tokens=last.trained_tokens,
            estimated_finish=int(time.time() + last.remaining_s),
        )


def checkpoint_name(job: Job, step: int) -> str:
    """What a checkpoint is called as a model."""
    return f"{job.model_name}{CHECKPOINT}{step}"


def forget_pruned(connection: sa.Connection, job_id: str) -> list[str]:
    """Drop the checkpoints whose folders the trainer has removed; their names as models."""
    rows = connection.execute(
        sa.select(checkpoints.c.model, checkpoints.c.path).where(checkpoints.c.job_id == job_id)
    )
    gone = [model for model, path in rows.tuples() if not Path(path).is_dir()]
    connection.execute(checkpoints.delete().where(checkpoints.c.model.in_(gone)))
    return gone


def _record_start(connection: sa.Connection, job: Job, event: TrainingStarted) -> None:
    change_job(
        connection,
        job.id,
        config=config_to_json(event.config),
        num_steps=event.num_steps,
        step=event.step,
    )
    forget_steps(connection, job.id, event.step)
    if event.step:
        message = f"Training goes on from step {event.step} of {event.num_steps}"
    else:
        message = (
            f"Training started: {event.num_samples:,} samples, {event.num_steps:,} steps, "
            f"{event.num_trainable_parameters:,} trainable parameters"
        )
    add_event(connection, job.id, message, data={"config": config_to_json(event.config)})


def _record_step(connection: sa.Connection, job: Job, event: TrainingProgress) -> None:
    metrics = api_metrics(event.metrics)
    shown = [
        f"{text}={metrics[name]:.4g}" for name, text in SHOWN_METRICS.items() if name in metrics
    ]
    message = f"Step {event.step}/{event.num_steps}: {', '.join(shown) or 'done'}"
    data = {"step": event.step, "total_steps": event.num_steps, **metrics}
    add_event(connection, job.id, message, step=event.step, data=data)


def _record_checkpoint(connection: sa.Connection, job: Job, event: TrainingCheckpoint) -> None:
    name = checkpoint_name(job, event.step)
    known = sa.select(checkpoints.c.model).where(checkpoints.c.model == name)
    if connection.execute(known).first() is not None:
        return  # told again by a job that goes on from it
    insert(
        connection,
        checkpoints,
        id=new_id("ftckpt"),
        created_at=int(time.time()),
        job_id=job.id,
        step=event.step,
        model=name,
        path=event.path,
        metrics=api_metrics(event.metrics),
    )
    change_job(connection, job.id, num_deaths=0)
    best = ", the best so far" if event.is_best else ""
    add_event(connection, job.id, f"Checkpoint created at step {event.step}{best}: {name}")


def api_metrics(metrics: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Metrics under the API's names, without those that JSON cannot hold."""
    return {API_NAMES.get(name, name): value for name, value in metrics if math.isfinite(value)}
