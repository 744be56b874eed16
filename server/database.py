"""The database: tables, and transactions that wait for a lock instead of failing.

Any SQLAlchemy URL; SQLite in the data folder by default. A transaction is a function of a
connection: it may run again where another one was in its way, so it must do nothing but read and
write rows. Rows are plain: every table has a growing `number`, which is the order of its rows.

Public   Database, the tables, insert, select_one, select_page
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

from engine.errors import EngineError

T = TypeVar("T")
VERSION = 1
"""Of the tables below; another number in the database is refused."""
LOCK_TIMEOUT_S = 5.0
"""How long a statement waits for another program's lock on an SQLite file."""
MAX_TRIES = 4
NUM_THREADS = 4
"""Of the database's own: one that waits for a lock must not keep others from tokenising."""
_CONFLICTS = ("40001", "40P01")  # serialisation failure, deadlock

metadata = sa.MetaData()


def _number() -> sa.Column[int]:
    # SQLite counts upwards by itself only in a column of this very type.
    kind = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Column("number", kind, primary_key=True, autoincrement=True)


def _id() -> sa.Column[str]:
    return sa.Column("id", sa.String(80), unique=True, nullable=False)


def _created_at() -> sa.Column[int]:
    """Unix time."""
    return sa.Column("created_at", sa.BigInteger, nullable=False)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(none_as_null=True))


files = sa.Table(
    "files",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("expires_at", sa.BigInteger, index=True),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("purpose", sa.String(40), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)
"""The bytes lie in the data folder, files/<id>."""

jobs = sa.Table(
    "jobs",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("is_paused", sa.Boolean, nullable=False, default=False),
    sa.Column("base_fingerprint", sa.String(80), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("reward_model", sa.Text),
    sa.Column("method", sa.String(20), nullable=False),
    sa.Column("suffix", sa.String(64)),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("training_file", sa.String(80), nullable=False),
    sa.Column("validation_file", sa.String(80)),
    _json("hyperparameters"),
    _json("config"),
    _json("metadata"),
    _json("integrations"),
    sa.Column("model_name", sa.String(160), unique=True, nullable=False),
    sa.Column("path", sa.Text),
    sa.Column("result_file", sa.String(80)),
    sa.Column("step", sa.BigInteger, nullable=False, default=0),
    sa.Column("num_steps", sa.BigInteger),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("estimated_finish", sa.BigInteger),
    sa.Column("num_deaths", sa.Integer, nullable=False, default=0),
    _json("error"),
)

events = sa.Table(
    "events",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("job_id", sa.String(80), nullable=False, index=True),
    sa.Column("level", sa.String(10), nullable=False),
    sa.Column("type", sa.String(10), nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("step", sa.BigInteger),
    _json("data"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("job_id", sa.String(80), nullable=False, index=True),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("model", sa.String(160), nullable=False, unique=True),
    sa.Column("path", sa.Text, nullable=False),
    _json("metrics"),
)

feedback = sa.Table(
    "feedback",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("response_id", sa.String(80), nullable=False, index=True),
    sa.Column("choice", sa.Integer, nullable=False, default=0),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger),
    sa.Column("rating", sa.String(10)),
    sa.Column("comment", sa.Text),
    _json("prompt"),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("preferred", sa.Text),
)
"""One judgement of one answer, with all that is needed to learn from it."""

responses = sa.Table(
    "responses",
    metadata,
    _number(),
    _id(),
    _created_at(),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger),
    _json("prompt"),
    _json("answers"),
)
"""Answers that may still be judged, where they are kept on disk."""

_about = sa.Table("about", metadata, sa.Column("version", sa.Integer, nullable=False))


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
        if getattr(error.orig, "sqlstate", None) == "53100" or "disk is full" in text:
            return StorageFull(
                f"The disk of the database {self._url} is full. Make room and try again."
            )
        return DatabaseError(f"The database {self._url} cannot be used now: {text}. Try again.")

    def _make_tables(self, connection: sa.Connection) -> None:
        metadata.create_all(connection)
        version = connection.execute(sa.select(_about.c.version)).scalar()
        if version is None:
            connection.execute(_about.insert().values(version=VERSION))
        elif version != VERSION:
            raise DatabaseError(
                f"The database {self._url} has tables of version {version}, this server knows "
                f"version {VERSION}. Use another --database or --data-dir."
            )


def insert(connection: sa.Connection, table: sa.Table, **values: object) -> None:
    """Add one row."""
    connection.execute(table.insert().values(**values))


def select_page(
    connection: sa.Connection,
    table: sa.Table,
    *conditions: sa.ColumnElement[bool],
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> tuple[list[dict[str, Any]], bool]:
    """A page of a list: rows, and whether there are more.

    Args:
        after: id of the row before the page; None is the list's beginning.
        newest_first: order of the list.

    Raises:
        LookupError: `after` is not in the list.
    """
    query = sa.select(table).where(*conditions)
    if after is not None:
        last = connection.execute(
            sa.select(table.c.number).where(table.c.id == after, *conditions)
        ).scalar()
        if last is None:
            raise LookupError(after)
        query = query.where(table.c.number < last if newest_first else table.c.number > last)
    order = table.c.number.desc() if newest_first else table.c.number.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).mappings().all()
    return [dict(row) for row in rows[:limit]], len(rows) > limit


def select_one(
    connection: sa.Connection, table: sa.Table, *conditions: sa.ColumnElement[bool]
) -> dict[str, Any] | None:
    """The row that meets the conditions."""
    row = connection.execute(sa.select(table).where(*conditions)).mappings().first()
    return dict(row) if row is not None else None


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
