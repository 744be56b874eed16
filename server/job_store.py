"""Fine-tuning jobs as rows: what a job is, and the functions of a connection that read and change
it. server/database.py runs them as transactions.

    validating_files -> queued -> running -> succeeded | failed | cancelled

A paused job is queued, with is_paused: OpenAI's list of states has no other place for it.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from engine.api import ErrorInfo
from server.hyperparameters import config_from_json, shown
from server.tables import checkpoints, events, insert, jobs, select_one

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
ORGANIZATION = "herd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of the table jobs, as it was when it was read."""

    number: int
    id: str
    created_at: int
    finished_at: int | None
    status: Status
    is_paused: bool
    base_fingerprint: str
    """Jobs of another base than the one that is served wait for theirs."""
    model: str
    reward_model: str | None
    method: str
    """The API's name of it."""
    suffix: str | None
    seed: int
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    """As given."""
    config: dict[str, Any]
    """The trainer's, as hyperparameters.config_to_json gives it; complete once the job runs."""
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]] | None
    model_name: str
    """What the result will be called."""
    path: str | None
    """Folder of the result, once there is one."""
    result_file: str | None
    step: int
    num_steps: int | None
    trained_tokens: int | None
    estimated_finish: int | None
    num_deaths: int
    """Workers that died in this job since its last checkpoint."""
    error: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape, and `paused`, `step` and `total_steps` besides."""
        hyperparameters = shown(config_from_json(self.config), self.hyperparameters)
        has_ended = self.status in ENDED
        method: dict[str, Any] = {"hyperparameters": hyperparameters}
        if self.reward_model is not None:
            method["grader"] = {"type": "score_model", "model": self.reward_model}
        return {
            "object": "fine_tuning.job",
            "id": self.id,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "status": self.status,
            "paused": self.is_paused,
            "model": self.model,
            "fine_tuned_model": self.model_name if self.status == "succeeded" else None,
            "organization_id": ORGANIZATION,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "result_files": [self.result_file] if self.result_file is not None else [],
            "hyperparameters": hyperparameters,
            "method": {"type": self.method, self.method: method},
            "seed": self.seed,
            "trained_tokens": self.trained_tokens if has_ended else None,
            "estimated_finish": self.estimated_finish if self.status == "running" else None,
            "error": self.error,
            "integrations": self.integrations or [],
            "metadata": self.metadata,
            "user_provided_suffix": self.suffix,
            "step": self.step,
            "total_steps": self.num_steps,
        }


def new_id(kind: Literal["ftjob", "ftevent", "ftckpt"]) -> str:
    return f"{kind}-{uuid.uuid4().hex[:24]}"


def get_job(connection: sa.Connection, job_id: str) -> Job | None:
    row = select_one(connection, jobs, jobs.c.id == job_id)
    return None if row is None else Job(**row)


def next_job(connection: sa.Connection, base_fingerprint: str, *statuses: Status) -> Job | None:
    """The oldest job of a base that is in one of the states and not paused."""
    query = (
        sa.select(jobs)
        .where(
            jobs.c.status.in_(statuses),
            jobs.c.base_fingerprint == base_fingerprint,
            sa.not_(jobs.c.is_paused),
        )
        # One that has run goes on before another begins.
        .order_by(sa.case((jobs.c.status == "running", 0), else_=1), jobs.c.number)
    )
    row = connection.execute(query.limit(1)).mappings().first()
    return None if row is None else Job(**row)


def change_job(
    connection: sa.Connection, job_id: str, *conditions: sa.ColumnElement[bool], **values: object
) -> bool:
    """Set columns where the job is still as the conditions say; whether it was."""
    query = jobs.update().where(jobs.c.id == job_id, *conditions).values(**values)
    return connection.execute(query).rowcount > 0


def end_job(
    connection: sa.Connection, job_id: str, status: Status, error: ErrorInfo | None = None
) -> bool:
    """Set a job's last state, unless it has one already; whether it had none."""
    shown_error = None
    if error is not None:
        shown_error = {"code": error.code, "message": error.message, "param": error.param}
    return change_job(
        connection,
        job_id,
        jobs.c.status.not_in(ENDED),
        status=status,
        is_paused=False,
        finished_at=int(time.time()),
        estimated_finish=None,
        error=shown_error,
    )


def add_event(
    connection: sa.Connection,
    job_id: str,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    step: int | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """One line of a job's history; with a step it holds that step's metrics in `data`."""
    insert(
        connection,
        events,
        id=new_id("ftevent"),
        created_at=int(time.time()),
        job_id=job_id,
        level=level,
        type="message" if step is None else "metrics",
        message=message,
        step=step,
        data=data,
    )


def forget_steps(connection: sa.Connection, job_id: str, after: int) -> None:
    """Drop the metrics of steps that are done again after a resume."""
    connection.execute(events.delete().where(events.c.job_id == job_id, events.c.step > after))


def metrics_by_step(connection: sa.Connection, job_id: str) -> list[dict[str, Any]]:
    """The data of all metrics events, in order."""
    query = (
        sa.select(events.c.data)
        .where(events.c.job_id == job_id, events.c.type == "metrics")
        .order_by(events.c.number)
    )
    return list(connection.scalars(query))


def event_dict(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table events in OpenAI's shape."""
    names = ("id", "created_at", "level", "message", "type", "data")
    return {"object": "fine_tuning.job.event", **{name: row[name] for name in names}}


def checkpoint_dict(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table checkpoints in OpenAI's shape."""
    metrics = row["metrics"]
    # An evaluation reads the whole validation file.
    both = ("valid_loss", "valid_mean_token_accuracy")
    whole = {f"full_{name}": metrics[name] for name in both if name in metrics}
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": row["id"],
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["model"],
        "fine_tuning_job_id": row["job_id"],
        "metrics": {"step": row["step"], **metrics, **whole},
        "step_number": row["step"],
    }


def published_models(connection: sa.Connection, base_fingerprint: str) -> dict[str, str]:
    """Every fine-tuned model of a base, and every checkpoint: name to folder, oldest first."""
    of_base = jobs.c.base_fingerprint == base_fingerprint
    results = connection.execute(
        sa.select(jobs.c.model_name, jobs.c.path)
        .where(of_base, jobs.c.status == "succeeded", jobs.c.path.is_not(None))
        .order_by(jobs.c.number)
    )
    steps = connection.execute(
        sa.select(checkpoints.c.model, checkpoints.c.path)
        .join(jobs, jobs.c.id == checkpoints.c.job_id)
        .where(of_base)
        .order_by(checkpoints.c.number)
    )
    return dict((*results.tuples(), *steps.tuples()))
