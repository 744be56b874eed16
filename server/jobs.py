"""Fine-tuning jobs as the API sees them: create, look at, cancel, pause, resume.

What runs them is server/job_runner.py; between the two there are only rows in the database, and a
word to the runner when one has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from adapters.registry import AdapterRecord
from engine.api import EngineInfo
from engine.errors import EngineError
from server.errors import ApiError, bad_request
from server.fine_tuning_schemas import CreateJobRequest
from server.job_creation import create_job
from server.job_data import Workshop, remove_data
from server.job_runner import JobRunner
from server.job_store import (
    ENDED,
    Job,
    add_event,
    change_job,
    end_job,
    get_job,
    published_models,
)
from server.tables import checkpoints, events, jobs, select_page

HOUSEKEEPING_S = 600.0


class Jobs:
    """All jobs of the server."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.runner = JobRunner(shop)
        self._housekeeping: asyncio.Task[None] | None = None

    async def start(self, info: EngineInfo) -> None:
        """List the fine-tuned models of this base and go on with its jobs, once the engine is
        ready.

        Raises:
            EngineError: the database cannot be read.
        """
        base = info.base_fingerprint
        models = await self.shop.database.read(lambda db: published_models(db, base))
        for name, path in models.items():
            if Path(path).is_dir():
                self.shop.adapters.fine_tuned[name] = Path(path)
        self.runner.start(base)
        self._housekeeping = asyncio.get_running_loop().create_task(self._keep_house())

    async def stop(self) -> None:
        """Stop working; jobs go on when a server is started again."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        await self.runner.stop()
        self.shop.database.close()

    async def create(
        self, body: CreateJobRequest, model: AdapterRecord | None, info: EngineInfo
    ) -> Job:
        """Put a job in the queue.

        Args:
            model: the adapter that body.model names; None is the base.

        Raises:
            ApiError, EngineError: it cannot be run as it is.
        """
        self._check_charge()
        job_id = await create_job(self.shop, body, model, info)
        self.runner.wake()
        return await self.get(job_id)

    async def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            ApiError: 404, there is none.
        """
        job = await self.shop.database.read(lambda db: get_job(db, job_id))
        if job is None:
            text = f"Could not find fine tune: {job_id[:100]}."
            raise ApiError(404, text, code="fine_tune_not_found", param="fine_tuning_job_id")
        return job

    async def page(
        self, *, after: str | None, limit: int, metadata: dict[str, str] | None
    ) -> tuple[list[Job], bool]:
        """Jobs, newest first, and whether there are more.

        Args:
            metadata: only jobs that have these pairs.

        Raises:
            LookupError: `after` is not in the list.
        """
        conditions = [
            jobs.c.metadata[key].as_string() == value for key, value in (metadata or {}).items()
        ]
        rows, has_more = await self.shop.database.read(
            lambda db: select_page(db, jobs, *conditions, after=after, limit=limit)
        )
        return [Job(**row) for row in rows], has_more

    async def events(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows of a job's history, newest first; errors as for `get` and `page`."""
        await self.get(job_id)
        return await self.shop.database.read(
            lambda db: select_page(db, events, events.c.job_id == job_id, after=after, limit=limit)
        )

    async def checkpoints(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows of a job's checkpoints, newest first; errors as for `get` and `page`."""
        await self.get(job_id)
        of_job = checkpoints.c.job_id == job_id
        return await self.shop.database.read(
            lambda db: select_page(db, checkpoints, of_job, after=after, limit=limit)
        )

    async def cancel(self, job_id: str) -> Job:
        """End a job for good; its checkpoints stay usable.

        Raises:
            ApiError: 404 no such job, 400 it has ended.
        """

        def work(connection: sa.Connection, job: Job) -> None:
            end_job(connection, job.id, "cancelled")
            add_event(connection, job.id, "The job was cancelled")

        job = await self._change(job_id, work)
        self.runner.interrupt(job_id, "cancelled")
        if job.status == "queued":
            await asyncio.to_thread(remove_data, self.shop.folder.job(job_id))
        return await self.get(job_id)

    async def pause(self, job_id: str) -> Job:
        """Have a job wait until it is resumed; one that runs stops at a checkpoint.

        Raises:
            ApiError: 404 no such job, 400 it has ended or is paused already.
        """

        def work(connection: sa.Connection, job: Job) -> None:
            if job.is_paused:
                raise bad_request(f"Job {job.id} is paused already.", code="invalid_job_state")
            status = "queued" if job.status == "running" else job.status
            change_job(connection, job.id, is_paused=True, status=status)
            add_event(connection, job.id, "The job was paused")

        await self._change(job_id, work)
        self.runner.interrupt(job_id, "paused")
        return await self.get(job_id)

    async def resume(self, job_id: str) -> Job:
        """Have a paused job go on where it was.

        Raises:
            ApiError: 404 no such job, 400 it is not paused.
        """

        def work(connection: sa.Connection, job: Job) -> None:
            if not job.is_paused:
                raise bad_request(f"Job {job.id} is not paused.", code="invalid_job_state")
            change_job(connection, job.id, is_paused=False)
            add_event(connection, job.id, "The job was resumed")

        await self._change(job_id, work)
        self.runner.wake()
        return await self.get(job_id)

    async def forget_model(self, name: str) -> None:
        """Delete a fine-tuned model, or the model that a checkpoint is, for good. The files of a
        checkpoint stay while its job has not ended: it may have to go on from there."""

        def work(connection: sa.Connection) -> list[str | None]:
            result = sa.select(jobs.c.path).where(jobs.c.model_name == name)
            checkpoint = (
                sa.select(checkpoints.c.path)
                .join(jobs, jobs.c.id == checkpoints.c.job_id)
                .where(checkpoints.c.model == name, jobs.c.status.in_(ENDED))
            )
            paths = [*connection.scalars(result), *connection.scalars(checkpoint)]
            connection.execute(jobs.update().where(jobs.c.model_name == name).values(path=None))
            connection.execute(checkpoints.delete().where(checkpoints.c.model == name))
            return paths

        paths = await self.shop.database.write(work)
        await self.shop.adapters.withdraw(name)
        for path in filter(None, paths):
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def _change(self, job_id: str, work: Callable[[sa.Connection, Job], None]) -> Job:
        """Change a job that has not ended; as it was before."""
        self._check_charge()

        def transaction(connection: sa.Connection) -> Job | None:
            job = get_job(connection, job_id)
            if job is not None and job.status not in ENDED:
                work(connection, job)
            return job

        job = await self.shop.database.write(transaction)
        if job is None:
            return await self.get(job_id)  # which says that there is none
        if job.status in ENDED:
            raise bad_request(
                f"Job {job_id} has ended already: it has {job.status}."
                if job.status != "cancelled"
                else f"Job {job_id} has been cancelled already.",
                code="invalid_job_state",
            )
        return job

    def _check_charge(self) -> None:
        if not self.runner.is_in_charge:
            raise ApiError(
                409,
                f"Another server runs the fine-tuning jobs in {self.shop.folder.path}; ask that "
                f"one, or start this one with a --data-dir of its own.",
                code="jobs_elsewhere",
            )

    async def _keep_house(self) -> None:
        while True:
            await asyncio.to_thread(self.shop.folder.remove_unfinished)
            with contextlib.suppress(EngineError, OSError):  # another time
                await self.shop.files.remove_expired()
            await asyncio.sleep(HOUSEKEEPING_S)
