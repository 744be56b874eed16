"""The database: transactions that wait for a lock instead of failing, in threads of their own.

Any SQLAlchemy URL; SQLite in the data folder by default. A transaction is a function of a
connection: it may run again where another one was in its way, so it must do nothing but read and
write rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa

from engine.errors import EngineError, RequestError
from server.tables import VERSION, about, metadata

T = TypeVar("T")
LOCK_TIMEOUT_S = 15.0
"""How long a statement waits for another program's lock on an SQLite file."""
MAX_TRIES = 4
NUM_THREADS = 4
"""Of the database's own: one that waits for a lock must not keep others from tokenising."""
_CONFLICTS = ("40001", "40P01")  # serialisation failure, deadlock


class DatabaseError(EngineError):
    """The database cannot be read or written now; nothing was changed."""

    code = "database_unavailable"


class StorageFull(EngineError):
    """There is no room on the disk; nothing was changed."""

    code = "storage_full"


class Database:
    """Transactions, each in a thread. Nothing is opened before the first one."""

    def __init__(self, url: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """
        Args:
            url: as SQLAlchemy takes it: sqlite:////path/herd.sqlite3, postgresql+psycopg://...
            lock_timeout_s: how long to wait for another program's lock.

        Raises:
            DatabaseError: the URL cannot be understood, or its driver is not installed.
        """
        try:
            self.engine = sa.create_engine(url, **_engine_options(url, lock_timeout_s))
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ImportError) as error:
            raise DatabaseError(
                f"--database: {error}. Expected a URL as SQLAlchemy takes it, such as "
                f"sqlite:////path/herd.sqlite3 or postgresql+psycopg://user@host/name, and its "
                f"driver installed."
            ) from error
        self._url = self.engine.url.render_as_string(hide_password=True)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="database")
        self._is_ready = False
        self._opening = threading.Lock()
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _set_up_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    def open(self) -> None:
        """Make the tables where they are missing.

        Raises:
            DatabaseError, StorageFull: they cannot be made, or are of another version.
        """
        with self._opening:
            if not self._is_ready:
                self._transaction(self._make_tables, writes=True)
                self._is_ready = True

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run a transaction that only reads; errors as for `write`."""
        return await self._in_thread(work, writes=False)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run a transaction.

        Raises:
            DatabaseError: another program holds it, or it is not there.
            StorageFull: no room on the disk.
            RequestError: it cannot hold such a value.
        """
        return await self._in_thread(work, writes=True)

    def run(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        """`write` or `read` in this thread."""
        if not self._is_ready:
            self.open()
        return self._transaction(work, writes=writes)

    def close(self) -> None:
        """Close all connections; the next transaction opens others."""
        self.engine.dispose()

    async def _in_thread(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        run = functools.partial(self.run, work, writes=writes)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def _transaction(self, work: Callable[[sa.Connection], T], *, writes: bool) -> T:
        last: sa.exc.DBAPIError | None = None
        for attempt in range(MAX_TRIES):
            if attempt:
                time.sleep(0.05 * 2**attempt * random.random())
            try:
                with self.engine.connect() as connection:
                    connection.info["writes"] = writes
                    with connection.begin():
                        return work(connection)
            except sa.exc.IntegrityError:
                raise
            except sa.exc.DBAPIError as error:
                last = error
                if not _is_passing(error):
                    break
            except sa.exc.TimeoutError as error:  # every connection of the pool is taken
                raise DatabaseError(f"The database is too busy: {error}. Try again.") from error
        assert last is not None
        raise self._named(last) from last

    def _named(self, error: sa.exc.DBAPIError) -> EngineError:
        text = " ".join(str(error.orig).split()) or type(error.orig).__name__
        if isinstance(error, sa.exc.DataError):  # PostgreSQL's texts have no zero bytes
            return RequestError(f"The database cannot hold this: {text}.")
        if getattr(error.orig, "sqlstate", None) == "53100" or "disk is full" in text:
            return StorageFull(
                f"The disk of the database {self._url} is full. Make room and try again."
            )
        return DatabaseError(f"The database {self._url} cannot be used now: {text}. Try again.")

    def _make_tables(self, connection: sa.Connection) -> None:
        metadata.create_all(connection)
        version = connection.execute(sa.select(about.c.version)).scalar()
        if version is None:
            connection.execute(about.insert().values(version=VERSION))
        elif version != VERSION:
            raise DatabaseError(
                f"The database {self._url} has tables of version {version}, this server knows "
                f"version {VERSION}. Use another --database or --data-dir."
            )


def _engine_options(url: str, lock_timeout_s: float) -> dict[str, Any]:
    if not url.startswith("sqlite"):
        return {"pool_pre_ping": True, "isolation_level": "REPEATABLE READ"}
    return {"connect_args": {"timeout": lock_timeout_s}}


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, in _begin_sqlite
    # With a write-ahead log readers and a writer do not wait for each other, and a process that is
    # killed leaves the file whole.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that first reads and then writes could find that another wrote in between.
    writes = connection.info.get("writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_passing(error: sa.exc.DBAPIError) -> bool:
    """Whether the same transaction may succeed at once: its connection had gone, or another
    transaction was in its way. SQLite has waited for a lock long enough by itself."""
    return error.connection_invalidated or getattr(error.orig, "sqlstate", "") in _CONFLICTS
