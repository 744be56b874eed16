"""Runs fine-tuning jobs, one after another: data first, then the worker trains, then the result is
published.

The database is the queue, so a server that was killed finds its jobs where they were: one that was
running is started again, and the trainer goes on from its last checkpoint. While the database
cannot be written the worker trains on, and what it says waits here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, TypeVar

import sqlalchemy as sa

from engine.api import (
    ErrorInfo,
    TrainingCheckpoint,
    TrainingEnded,
    TrainingEvent,
    TrainingJob,
    TrainingProgress,
)
from engine.errors import AdapterError, EngineError
from server.database import DatabaseError, StorageFull, jobs
from server.errors import ApiError
from server.hyperparameters import config_from_json
from server.job_data import (
    TRAINING_DATA,
    VALIDATION_DATA,
    Workshop,
    add_template,
    prepare_file,
    remove_data,
    training_job,
)
from server.job_events import api_metrics, checkpoint_name, forget_pruned, record
from server.job_store import (
    Job,
    Status,
    add_event,
    change_job,
    end_job,
    get_job,
    metrics_by_step,
    next_job,
)
from server.metric_sinks import MetricSinks
from server.results import results_csv

T = TypeVar("T")
Interruption = Literal["paused", "cancelled"]
Note = tuple[Literal["info", "warn", "error"], str]
log = logging.getLogger("herd.jobs")
MAX_DEATHS = 3
"""Workers that may die in a job without a new checkpoint; then the job is taken for the cause."""
RETRY_S = 1.0
ENGINE_POLL_S = 0.1
LOCK_POLL_S = 2.0
WORKER_GONE = "engine_restarting"


class JobRunner:
    """Two loops: one prepares the data of new jobs, one has the engine train those that wait."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._database = shop.database
        self._alarms: list[asyncio.Event] = []
        self._events: asyncio.Queue[TrainingEvent] = asyncio.Queue()
        self._current: str | None = None
        """The job that the engine trains."""
        self._interruption: Interruption | None = None
        """What the user has asked for it meanwhile."""
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
        if self._current == job_id:
            self._interruption = status
            self._shop.engine.stop_training(job_id, status)

    def _on_event(self, event: TrainingEvent) -> None:
        if event.job_id == self._current:
            self._events.put_nowait(event)

    async def _run(self, base: str) -> None:
        async with self._charge(base), asyncio.TaskGroup() as group:
            group.create_task(self._loop(base, self._prepare, "validating_files"))
            group.create_task(self._loop(base, self._train, "running", "queued"))

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
            job = await self._persist(lambda db: next_job(db, base, *statuses), writes=False)
            if job is None:
                await alarm.wait()
                continue
            try:
                await work(job)
            except Exception as error:  # the job's boundary
                log.exception("job %s failed", job.id)
                await self._fail(job, _info(error))

    # Data.

    async def _prepare(self, job: Job) -> None:
        shop, info = self._shop, self._shop.engine.info
        assert info is not None, "jobs run once the engine is ready"
        folder = shop.folder.job(job.id)
        files = [("training_file", job.training_file, TRAINING_DATA)]
        if job.validation_file is not None:
            files.append(("validation_file", job.validation_file, VALIDATION_DATA))
        for param, file_id, name in files:
            try:
                file = await shop.files.get(file_id, param)
                prepared = await asyncio.to_thread(
                    prepare_file,
                    shop.files.path(file.id),
                    folder,
                    name,
                    file_name=file.filename,
                    config=config_from_json(job.config),
                    shop=shop,
                    info=info,
                )
            except (EngineError, ApiError, OSError) as error:
                await self._fail(job, _info(error, param))
                return
            notes: list[Note] = [("info", f"{file.filename}: {prepared.summary()}")]
            notes += [("warn", f"{file.filename}: {text}") for text in prepared.warnings]
            await self._tell(job, notes)
        validating = jobs.c.status == "validating_files"
        if await self._persist(lambda db: change_job(db, job.id, validating, status="queued")):
            await self._tell(job, [("info", "Files validated, the job is queued")])
            self.wake()
        else:  # cancelled meanwhile
            await asyncio.to_thread(remove_data, folder)

    # Training.

    async def _train(self, job: Job) -> None:
        self._current, self._interruption = job.id, None
        try:
            claimed = await self._persist(
                lambda db: change_job(
                    db,
                    job.id,
                    jobs.c.status.in_(("queued", "running")),
                    sa.not_(jobs.c.is_paused),
                    status="running",
                )
            )
            if claimed and await self._is_engine_ready():
                with self._sinks(job) as sinks:
                    ended = await self._train_once(job, sinks)
                await self._finish(job, ended)
        finally:
            self._current = None

    async def _train_once(self, job: Job, sinks: MetricSinks) -> TrainingEnded:
        """Have the engine train until the job ends, or the engine does."""
        shop, info = self._shop, self._shop.engine.info
        assert info is not None
        plan = await asyncio.to_thread(training_job, job, shop, info)
        self._events = asyncio.Queue()
        try:
            async with self._reward_adapter(plan):
                shop.engine.start_training(plan)
                if self._interruption is not None:  # asked for while it was being started
                    shop.engine.stop_training(job.id, self._interruption)
                return await self._follow(job, sinks)
        except EngineError as error:
            return TrainingEnded(job_id=job.id, status="failed", step=job.step, error=error.info())

    async def _follow(self, job: Job, sinks: MetricSinks) -> TrainingEnded:
        """Write down what the trainer says until its last word, which is returned."""
        while True:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            news = [event for event in batch if not isinstance(event, TrainingEnded)]
            await self._record(job, news, sinks)
            if len(news) < len(batch):
                ended = batch[-1]
                assert isinstance(ended, TrainingEnded)
                return ended

    async def _record(self, job: Job, news: Sequence[TrainingEvent], sinks: MetricSinks) -> None:
        if not news:
            return
        folder = self._shop.folder.job(job.id)
        steps = [event for event in news if isinstance(event, TrainingCheckpoint)]
        for step in steps:
            with contextlib.suppress(OSError):  # a full disk; tried again when it is published
                await asyncio.to_thread(add_template, folder, Path(step.path))
        await self._persist(lambda db: record(db, job, news))
        for event in news:
            if isinstance(event, TrainingProgress):
                sinks.log(event.step, api_metrics(event.metrics))
        fine_tuned = self._shop.adapters.fine_tuned
        fine_tuned.update({checkpoint_name(job, e.step): Path(e.path) for e in steps})
        if steps:
            for name in await self._persist(lambda db: forget_pruned(db, job.id)):
                fine_tuned.pop(name, None)

    async def _finish(self, job: Job, ended: TrainingEnded) -> None:
        """What follows from the trainer's last word."""
        error = ended.error
        if ended.status == "succeeded":
            assert ended.path is not None
            error = await self._publish(job, Path(ended.path), ended)
            if error is not None:
                await self._fail(job, error)
        elif ended.status == "failed" and error is not None and error.code == WORKER_GONE:
            await self._survive(job, error)
        elif ended.status == "failed":
            await self._fail(job, error or ErrorInfo(code="internal_error", message="Failed."))
        else:  # the row says so already
            await self._persist(
                lambda db: change_job(
                    db, job.id, step=ended.step, trained_tokens=ended.trained_tokens
                )
            )
            if ended.status == "cancelled":
                await asyncio.to_thread(remove_data, self._shop.folder.job(job.id))

    async def _survive(self, job: Job, error: ErrorInfo) -> None:
        """The worker died or the server stops: the job stays "running", and the loop starts it
        again; after too many deaths without a new checkpoint it is taken for the cause."""
        if self._shop.engine.state == "stopped":
            return
        now = await self._persist(lambda db: get_job(db, job.id), writes=False)
        if now is None or now.status != "running":
            return  # cancelled or paused meanwhile
        deaths = now.num_deaths + 1
        if deaths >= MAX_DEATHS:
            text = f"{deaths} engine workers died in this job. {error.message}"
            await self._fail(job, ErrorInfo(code="worker_died", message=text))
            return
        await self._persist(lambda db: change_job(db, job.id, num_deaths=deaths))
        text = "The engine worker ended; training goes on from the last checkpoint"
        await self._tell(job, [("warn", text)])

    async def _publish(self, job: Job, path: Path, ended: TrainingEnded) -> ErrorInfo | None:
        """Make the result a model; what is wrong with it where it cannot be one."""
        shop = self._shop
        notes: list[Note] = []
        try:
            await asyncio.to_thread(add_template, shop.folder.job(job.id), path)
            await shop.adapters.publish_trained(job.model_name, path)
        except AdapterError as error:
            await shop.adapters.withdraw(job.model_name)
            return error.info()
        except (EngineError, OSError) as error:  # the worker has just died: loaded when it is used
            notes.append(("warn", f"The model will be loaded when it is first used: {error}"))
        result_file = None
        try:
            metrics = await self._persist(lambda db: metrics_by_step(db, job.id), writes=False)
            result = await shop.files.add_bytes(
                f"step_metrics_{job.id}.csv", results_csv(metrics), "fine-tune-results"
            )
            result_file = result.id
        except (ApiError, EngineError) as error:
            notes.append(("warn", f"The results file could not be written: {error}"))

        def succeed(connection: sa.Connection) -> bool:
            change_job(
                connection, job.id, path=str(path), result_file=result_file, step=ended.step,
                trained_tokens=ended.trained_tokens,
            )  # fmt: skip
            if not end_job(connection, job.id, "succeeded"):
                return False
            add_event(connection, job.id, f"New fine-tuned model created: {job.model_name}")
            add_event(connection, job.id, "The job has successfully completed")
            return True

        await self._tell(job, notes)
        if not await self._persist(succeed):  # cancelled at the last moment
            await shop.adapters.withdraw(job.model_name)
        await asyncio.to_thread(remove_data, shop.folder.job(job.id))
        return None

    # Parts.

    async def _is_engine_ready(self) -> bool:
        """Wait for it; False where the user wants to go no further."""
        while self._shop.engine.state != "ready":
            if self._interruption is not None:
                return False
            await asyncio.sleep(ENGINE_POLL_S)
        return True

    @asynccontextmanager
    async def _reward_adapter(self, plan: TrainingJob) -> AsyncIterator[None]:
        """Have the adapter that scores answers in the engine while a job runs."""
        if plan.reward_adapter is None:
            yield
            return
        await self._shop.engine.load_adapter(plan.reward_adapter)
        try:
            yield
        finally:
            with contextlib.suppress(EngineError):  # the worker has gone, and the adapter with it
                await self._shop.engine.unload_adapter(plan.reward_adapter)

    @contextlib.contextmanager
    def _sinks(self, job: Job) -> Iterator[MetricSinks]:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected

        def tell(message: str) -> None:  # called in another thread
            note: Note = ("warn", message)
            loop.call_soon_threadsafe(lambda: tasks.add(loop.create_task(self._tell(job, [note]))))

        sinks = MetricSinks(job, self._shop.tensorboard_dir, on_failure=tell)
        try:
            yield sinks
        finally:
            sinks.close()

    # Rows.

    async def _tell(self, job: Job, notes: Sequence[Note]) -> None:
        """Add to the job's history."""

        def work(connection: sa.Connection) -> None:
            for level, message in notes:
                add_event(connection, job.id, message, level=level)

        if notes:
            await self._persist(work)

    async def _fail(self, job: Job, error: ErrorInfo) -> None:
        """End a job with an error, which becomes part of its history."""
        log.error("job %s failed: %s", job.id, " ".join(error.message.split()))
        await self._tell(job, [("error", error.message)])
        await self._persist(lambda db: end_job(db, job.id, "failed", error))
        await asyncio.to_thread(remove_data, self._shop.folder.job(job.id))

    async def _persist(self, work: Callable[[sa.Connection], T], *, writes: bool = True) -> T:
        """Run a transaction as soon as the database can."""
        has_told = False
        while True:
            try:
                run = self._database.write if writes else self._database.read
                return await run(work)
            except (DatabaseError, StorageFull) as error:
                if not has_told:
                    log.error("jobs wait for the database: %s", error)
                has_told = True
                await asyncio.sleep(RETRY_S)


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
