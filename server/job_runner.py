"""Runs fine-tuning jobs, one after another: data first, then the worker trains, then the result is
published.

The database is the queue, so a server that was killed finds its jobs where they were: one that was
running is started again, and the trainer goes on from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import sqlalchemy as sa

from engine.api import ErrorInfo, TrainingEnded, TrainingEvent
from engine.errors import EngineError
from server.database import DatabaseError
from server.errors import ApiError
from server.hyperparameters import config_from_json
from server.job_data import (
    TRAINING_DATA,
    VALIDATION_DATA,
    Workshop,
    prepare_file,
    remove_data,
)
from server.job_rows import JobRows, Note, patiently
from server.job_store import ENDED, Job, Status, change_job, get_job, next_job
from server.job_training import Interruption, TrainingRun, publish
from server.tables import jobs

log = logging.getLogger("herd.jobs")
MAX_DEATHS = 3
"""Workers that may die in a job without a new checkpoint; then the job is taken for the cause."""
ENGINE_POLL_S = 0.1
LOCK_POLL_S = 2.0
WORKER_GONE = "engine_restarting"


class JobRunner:
    """Two loops: one prepares the data of new jobs, one has the engine train those that wait."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._rows = JobRows(shop.database)
        self._alarms: list[asyncio.Event] = []
        self._training: TrainingRun | None = None
        self._task: asyncio.Task[None] | None = None
        self.is_in_charge = False
        """Whether this server runs the jobs: another one with the same data folder may do so."""

    def start(self, base_fingerprint: str) -> None:
        """Begin, once the engine is ready."""
        self._shop.engine.on_training_event = self._on_event
        self._task = asyncio.get_running_loop().create_task(self._run(base_fingerprint))

    async def stop(self) -> None:
        """Stop; what runs goes on when a server is started again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """A job has been created or resumed."""
        for alarm in self._alarms:
            alarm.set()

    def interrupt(self, job_id: str, status: Interruption) -> None:
        """Have the engine stop a job whose row says so already."""
        if self._training is not None and self._training.job.id == job_id:
            self._training.interrupt(status)

    def _on_event(self, event: TrainingEvent) -> None:
        if self._training is not None:
            self._training.hear(event)

    async def _run(self, base: str) -> None:
        try:
            async with self._charge(base), asyncio.TaskGroup() as group:
                group.create_task(self._loop(base, self._prepare, "validating_files"))
                group.create_task(self._loop(base, self._train, "running", "queued"))
        except Exception:  # the runner's boundary
            log.exception("fine-tuning jobs do not run any more; restart the server")

    @asynccontextmanager
    async def _charge(self, base: str) -> AsyncIterator[None]:
        """Wait until no other server runs the jobs of this base in this folder."""
        is_first = True
        while True:
            with self._shop.folder.lock(f"jobs-{base}") as has_lock:
                if has_lock:
                    self.is_in_charge = True
                    try:
                        yield
                    finally:
                        self.is_in_charge = False
                    return
            if is_first:
                log.warning(
                    "another server runs the fine-tuning jobs in %s; they are this one's when it "
                    "has ended",
                    self._shop.folder.path,
                )
            is_first = False
            await asyncio.sleep(LOCK_POLL_S)

    async def _loop(
        self, base: str, work: Callable[[Job], Awaitable[None]], *statuses: Status
    ) -> None:
        """Do one job after another, and wait where there is none."""
        alarm = asyncio.Event()
        self._alarms.append(alarm)
        while True:
            alarm.clear()
            job = await self._rows.read(lambda db: next_job(db, base, *statuses))
            if job is None:
                await alarm.wait()
                continue
            try:
                await work(job)
            except Exception as error:  # the job's boundary
                log.exception("job %s failed", job.id)
                await self._rows.fail(job.id, _info(error))
            await self._tidy(job)

    async def _tidy(self, job: Job) -> None:
        """A job that has ended needs its tokens no more."""
        now = await self._rows.read(lambda db: get_job(db, job.id))
        if now is None or now.status in ENDED:
            await asyncio.to_thread(remove_data, self._shop.folder.job(job.id))

    async def _prepare(self, job: Job) -> None:
        """Tokenise a new job's files and put it in the queue."""
        files = [("training_file", job.training_file, TRAINING_DATA)]
        if job.validation_file is not None:
            files.append(("validation_file", job.validation_file, VALIDATION_DATA))
        errors = []
        for param, file_id, part in files:
            try:
                notes = await self._prepare_file(job, param, file_id, part)
            except (EngineError, ApiError, OSError) as error:
                errors.append(_info(error, param))
                continue
            await self._rows.tell(job.id, notes)
        if errors:
            message = "\n".join(error.message for error in errors)
            await self._rows.fail(job.id, dataclasses.replace(errors[0], message=message))
            return
        validating = jobs.c.status == "validating_files"
        if await self._rows.write(lambda db: change_job(db, job.id, validating, status="queued")):
            await self._rows.tell(job.id, [("info", "Files validated, the job is queued")])
            self.wake()

    async def _prepare_file(self, job: Job, param: str, file_id: str, part: str) -> list[Note]:
        shop, info = self._shop, self._shop.engine.info
        assert info is not None, "jobs run once the engine is ready"
        file = await patiently(lambda: shop.files.get(file_id, param), (DatabaseError,))
        prepared = await asyncio.to_thread(
            prepare_file,
            shop.files.path(file.id),
            shop.folder.job(job.id),
            part,
            file_name=file.filename,
            config=config_from_json(job.config),
            shop=shop,
            info=info,
        )
        notes: list[Note] = [("info", f"{file.filename}: {prepared.summary()}")]
        return notes + [("warn", f"{file.filename}: {text}") for text in prepared.warnings]

    async def _train(self, job: Job) -> None:
        """Take a job from the queue, train, and see what has become of it."""
        run = self._training = TrainingRun(job, self._shop, self._rows)
        try:
            waits = jobs.c.status.in_(("queued", "running")), sa.not_(jobs.c.is_paused)
            has_it = await self._rows.write(
                lambda db: change_job(db, job.id, *waits, status="running")
            )
            if has_it and await self._is_engine_ready(run):
                await self._finish(job, await run.run())
        finally:
            self._training = None

    async def _is_engine_ready(self, run: TrainingRun) -> bool:
        """Wait for it; False where the user wants to go no further."""
        while self._shop.engine.state != "ready":
            if run.interruption is not None:
                return False
            await asyncio.sleep(ENGINE_POLL_S)
        return True

    async def _finish(self, job: Job, ended: TrainingEnded) -> None:
        """What follows from the trainer's last word."""
        error = ended.error
        if ended.status == "succeeded":
            error = await publish(job, ended, self._shop, self._rows)
        elif error is not None and error.code == WORKER_GONE:
            error = await self._survive(job, error)
        elif ended.status in ("cancelled", "paused"):  # the row says so already
            done = {"step": ended.step, "trained_tokens": ended.trained_tokens}
            await self._rows.write(lambda db: change_job(db, job.id, **done))
        if error is not None:
            await self._rows.fail(job.id, error)

    async def _survive(self, job: Job, error: ErrorInfo) -> ErrorInfo | None:
        """The worker died, or the server ends: the job stays "running" and is started again. After
        too many deaths without a new checkpoint it is taken for the cause, which is returned."""
        now = await self._rows.read(lambda db: get_job(db, job.id))
        if self._shop.engine.state == "stopped" or now is None or now.status != "running":
            return None  # cancelled or paused meanwhile
        deaths = now.num_deaths + 1
        if deaths >= MAX_DEATHS:
            text = f"{deaths} engine workers died in this job. {error.message}"
            return ErrorInfo(code="worker_died", message=text)
        await self._rows.write(lambda db: change_job(db, job.id, num_deaths=deaths))
        text = "The engine worker ended; training goes on from the last checkpoint"
        await self._rows.tell(job.id, [("warn", text)])
        return None


def _info(error: Exception, param: str | None = None) -> ErrorInfo:
    """An exception as a job's error; what is unforeseen says nothing about the inside."""
    if isinstance(error, EngineError):
        return ErrorInfo(code=error.code, message=str(error), param=error.param or param)
    if isinstance(error, ApiError):
        return ErrorInfo(code=error.code, message=error.message, param=error.param or param)
    if isinstance(error, OSError):
        text = f"The job's data could not be read or written: {error}."
        return ErrorInfo(code="storage_unavailable", message=text, param=param)
    return ErrorInfo(
        code="internal_error", message="Internal error; the server's log has the details."
    )
