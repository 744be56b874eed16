"""One run of one job in the engine: started, followed, written down; in the end its result is a
model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

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
from server.database import DatabaseError
from server.errors import ApiError
from server.files import FileRecord
from server.job_data import Workshop, add_template, training_job
from server.job_events import api_metrics, checkpoint_name, forget_pruned, record
from server.job_rows import JobRows, Note, patiently
from server.job_store import Job, add_event, change_job, end_job, metrics_by_step
from server.metric_sinks import MetricSinks
from server.results import results_csv

Interruption = Literal["paused", "cancelled"]
RESULTS = "fine-tune-results"


class TrainingRun:
    """A job while the engine trains it. Touched on the event loop only."""

    def __init__(self, job: Job, shop: Workshop, rows: JobRows) -> None:
        self.job = job
        self._shop = shop
        self._rows = rows
        self._news: asyncio.Queue[TrainingEvent] = asyncio.Queue()
        self._is_started = False
        self.interruption: Interruption | None = None
        """What the user has asked for meanwhile."""

    def hear(self, event: TrainingEvent) -> None:
        """Something the engine says about some job."""
        if event.job_id == self.job.id:
            self._news.put_nowait(event)

    def interrupt(self, status: Interruption) -> None:
        """Have the engine stop, now or as soon as it has begun."""
        self.interruption = status
        if self._is_started:
            self._shop.engine.stop_training(self.job.id, status)

    async def run(self) -> TrainingEnded:
        """Train until the job ends, or the engine does."""
        shop, info = self._shop, self._shop.engine.info
        assert info is not None, "jobs run once the engine is ready"
        plan = await asyncio.to_thread(training_job, self.job, shop, info)
        try:
            async with self._reward_adapter(plan):
                shop.engine.start_training(plan)
                self._is_started = True
                if self.interruption is not None:
                    self.interrupt(self.interruption)
                with self._sinks() as sinks:
                    return await self._follow(sinks)
        except EngineError as error:
            return TrainingEnded(job_id=self.job.id, status="failed", error=error.info())

    async def _follow(self, sinks: MetricSinks) -> TrainingEnded:
        """Write down what the trainer says until its last word, which is returned."""
        while True:
            batch = [await self._news.get()]
            while not self._news.empty():
                batch.append(self._news.get_nowait())
            news = [event for event in batch if not isinstance(event, TrainingEnded)]
            try:
                await self._record(news, sinks)
            except Exception:
                # The engine must not train on for nobody: another job would not get its turn.
                while not isinstance(batch[-1], TrainingEnded):
                    self._shop.engine.stop_training(self.job.id, "cancelled")
                    batch.append(await self._news.get())
                raise
            if isinstance(batch[-1], TrainingEnded):
                return batch[-1]

    async def _record(self, news: Sequence[TrainingEvent], sinks: MetricSinks) -> None:
        job, folder = self.job, self._shop.folder.job(self.job.id)
        saved = [event for event in news if isinstance(event, TrainingCheckpoint)]
        for checkpoint in saved:
            with contextlib.suppress(OSError):  # a full disk
                await asyncio.to_thread(add_template, folder, Path(checkpoint.path))
        await self._rows.write(lambda db: record(db, job, news))
        for event in news:
            if isinstance(event, TrainingProgress):
                sinks.log(event.step, api_metrics(event.metrics))
        fine_tuned = self._shop.adapters.fine_tuned
        fine_tuned.update({checkpoint_name(job, e.step): Path(e.path) for e in saved})
        if saved:
            for name in await self._rows.write(lambda db: forget_pruned(db, job.id)):
                fine_tuned.pop(name, None)

    @asynccontextmanager
    async def _reward_adapter(self, plan: TrainingJob) -> AsyncIterator[None]:
        """Have the adapter that scores answers in the engine while the job runs."""
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
    def _sinks(self) -> Iterator[MetricSinks]:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected

        def tell(message: str) -> None:  # called in another thread
            note: Note = ("warn", message)
            loop.call_soon_threadsafe(
                lambda: tasks.add(loop.create_task(self._rows.tell(self.job.id, [note])))
            )

        sinks = MetricSinks(self.job, self._shop.tensorboard_dir, on_failure=tell)
        try:
            yield sinks
        finally:
            sinks.close()


async def publish(
    job: Job, ended: TrainingEnded, shop: Workshop, rows: JobRows
) -> ErrorInfo | None:
    """Make the result of a job that has succeeded a model; what is wrong where it can be none."""
    assert ended.path is not None
    path, notes = Path(ended.path), list[Note]()
    try:
        await asyncio.to_thread(add_template, shop.folder.job(job.id), path)
        await shop.adapters.publish_trained(job.model_name, path)
    except (EngineError, OSError) as error:
        if isinstance(error, AdapterError) and not isinstance(error.__cause__, OSError):
            await shop.adapters.withdraw(job.model_name)
            return error.info()
        # The worker has just died, or there is no room for the server's own copy.
        notes.append(("warn", f"The model will be loaded when it is first used: {error}"))
    result_file = None
    try:
        result_file = (await _write_results(job, shop, rows)).id
    except (ApiError, EngineError) as error:
        notes.append(("warn", f"The results file could not be written: {error}"))
    await rows.tell(job.id, notes)

    def succeed(connection: sa.Connection) -> bool:
        change_job(
            connection,
            job.id,
            path=str(path),
            result_file=result_file,
            step=ended.step,
            trained_tokens=ended.trained_tokens,
        )
        if not end_job(connection, job.id, "succeeded"):
            return False
        add_event(connection, job.id, f"New fine-tuned model created: {job.model_name}")
        add_event(connection, job.id, "The job has successfully completed")
        return True

    if not await rows.write(succeed):  # cancelled at the last moment
        await shop.adapters.withdraw(job.model_name)
    return None


async def _write_results(job: Job, shop: Workshop, rows: JobRows) -> FileRecord:
    metrics = await rows.read(lambda db: metrics_by_step(db, job.id))
    name, content = f"step_metrics_{job.id}.csv", results_csv(metrics)
    return await patiently(lambda: shop.files.add_bytes(name, content, RESULTS), (DatabaseError,))
