"""What the runner writes into the rows of jobs, as soon as the database can take it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

import sqlalchemy as sa

from engine.api import ErrorInfo
from engine.errors import EngineError
from server.database import Database, DatabaseError, StorageFull
from server.job_store import add_event, end_job

T = TypeVar("T")
Note = tuple[Literal["info", "warn", "error"], str]
log = logging.getLogger("herd.jobs")
RETRY_S = 1.0


class JobRows:
    """A database that is locked, full or gone for a while delays a job and loses nothing of it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        return await patiently(lambda: self._database.read(work))

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        return await patiently(lambda: self._database.write(work))

    async def tell(self, job_id: str, notes: Sequence[Note]) -> None:
        """Add to a job's history."""

        def work(connection: sa.Connection) -> None:
            for level, message in notes:
                add_event(connection, job_id, message, level=level)

        if notes:
            await self.write(work)

    async def fail(self, job_id: str, error: ErrorInfo) -> None:
        """End a job with an error, which becomes part of its history."""
        log.error("job %s failed: %s", job_id, " ".join(error.message.split()))

        def work(connection: sa.Connection) -> None:
            if end_job(connection, job_id, "failed", error):
                add_event(connection, job_id, error.message, level="error")

        await self.write(work)


async def patiently(
    work: Callable[[], Awaitable[T]],
    passing: tuple[type[EngineError], ...] = (DatabaseError, StorageFull),
) -> T:
    """Do something until it does not fail with one of the errors that pass."""
    has_told = False
    while True:
        try:
            return await work()
        except passing as error:
            if not has_told:
                log.error("jobs wait: %s", error)
            has_told = True
            await asyncio.sleep(RETRY_S)
