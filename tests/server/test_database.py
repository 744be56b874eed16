"""The database by itself: SQLite, and PostgreSQL where its server is installed."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa

from server import tables
from server.database import Database, DatabaseError, StorageFull
from server.tables import insert, select_one, select_page
from tests.server.job_fixtures import (
    create,
    herd,
    loadable_adapters,
    started,
    until_status,
    upload,
)


@pytest.fixture(scope="module")
def postgres_url():
    """A PostgreSQL server of our own on a socket; it refuses to run as root."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("PostgreSQL is not installed (initdb, pg_ctl)")
    user = "nobody" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="herd-postgres-", dir="/tmp"))
    if user is not None:
        shutil.chown(folder, user)
    data, log = folder / "data", folder / "log"

    def run(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    try:
        run("initdb", "-D", str(data), "-U", "herd", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-D", str(data), "-l", str(log), "-o", options, "-w", "start")
        yield f"postgresql+psycopg://herd@/postgres?host={folder}"
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request, tmp_path):
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'herd.sqlite3'}"
    else:
        url = request.getfixturevalue("postgres_url")
    database = Database(url, lock_timeout_s=0.2)
    yield database
    tables.metadata.drop_all(database.engine)
    database.close()


def add_file(connection, name):
    insert(connection, tables.files, id=name, created_at=1, filename=name, purpose="batch", bytes=3)


def names(page):
    return [row["id"] for row in page[0]]


async def test_rows_come_in_pages_in_the_order_in_which_they_were_made(database):
    for name in "abcde":
        await database.write(lambda db, name=name: add_file(db, name))

    def page(**options):
        return database.read(lambda db: select_page(db, tables.files, **options))

    assert names(await page(after=None, limit=2)) == ["e", "d"]
    assert names(await page(after="d", limit=2)) == ["c", "b"]
    assert (await page(after="c", limit=2))[1] is False
    assert names(await page(after="b", limit=9, newest_first=False)) == ["c", "d", "e"]
    with pytest.raises(LookupError):
        await page(after="z", limit=2)


async def test_a_transaction_is_done_whole_or_not_at_all(database):
    def two(connection):
        add_file(connection, "first")
        add_file(connection, "first")

    with pytest.raises(sa.exc.IntegrityError):
        await database.write(two)
    found = await database.read(
        lambda db: select_one(db, tables.files, tables.files.c.id == "first")
    )
    assert found is None


async def test_transactions_at_the_same_time_lose_nothing(database):
    await database.write(lambda db: add_file(db, "counter"))
    counter = tables.files.c.id == "counter"

    def count(connection):  # reads, then writes what it read
        row = select_one(connection, tables.files, counter)
        connection.execute(tables.files.update().where(counter).values(bytes=row["bytes"] + 1))

    await asyncio.gather(*(database.write(count) for _ in range(40)))
    row = await database.read(lambda db: select_one(db, tables.files, counter))
    assert row["bytes"] == 43


async def test_what_was_written_is_there_for_the_next_server(database):
    await database.write(lambda db: add_file(db, "a"))
    url = database.engine.url
    database.close()
    other = Database(url.render_as_string(hide_password=False))
    page = await other.read(lambda db: select_page(db, tables.files, after=None, limit=9))
    assert names(page) == ["a"]
    other.close()


async def test_tables_of_another_version_are_refused(database):
    database.open()
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE about SET version = 99"))
    again = Database(database.engine.url.render_as_string(hide_password=False))
    with pytest.raises(DatabaseError, match="version 99"):
        again.open()
    again.close()


async def test_jobs_run_on_either_database(database, monkeypatch):
    loadable_adapters(monkeypatch)
    url = database.engine.url.render_as_string(hide_password=False)
    async with herd(database_url=url) as h:
        first = await create(h.client, metadata={"k": "v"})
        done = await until_status(h.client, first.id, "succeeded")
        assert done.metadata == {"k": "v"}
        assert done.method.supervised.hyperparameters.n_epochs == 3
        pages = h.client.fine_tuning.jobs
        found = await pages.list(extra_query={"metadata[k]": "v"})
        assert [job.id for job in found.data] == [first.id]
        assert (await pages.list(extra_query={"metadata[k]": "w"})).data == []
        for key in ("'", "$.k", "a]b", "k\\", "ß", "%", ""):
            assert (await pages.list(extra_query={f"metadata[{key}]": "v"})).data == []
        for key in ('"', "\0"):
            with pytest.raises(openai.BadRequestError, match="metadata"):
                await pages.list(extra_query={f"metadata[{key}]": "v"})
        for strange in ("\x00", "'; DROP TABLE jobs; --", "ß" * 300):
            with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
                await pages.list(after=strange)
        assert len([e async for e in await pages.list_events(first.id, limit=3)]) > 8
        assert len((await pages.checkpoints.list(first.id)).data) == 2
        h.engine.train = lambda job: [started(job)]
        second = await create(h.client)
        assert (await pages.cancel(second.id)).status == "cancelled"
        assert len((await h.client.files.list()).data) >= 2


async def test_a_lock_of_another_program_is_waited_for_and_then_told(tmp_path):
    path = tmp_path / "herd.sqlite3"
    database = Database(f"sqlite:///{path}", lock_timeout_s=0.3)
    await database.write(lambda db: add_file(db, "a"))
    other = sqlite3.connect(path, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked"):
        await database.write(lambda db: add_file(db, "b"))
    assert names(await database.read(lambda db: select_page(db, tables.files, after=None, limit=9)))
    threading.Timer(0.1, other.rollback).start()
    await database.write(lambda db: add_file(db, "c"))
    other.close()
    database.close()


async def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path):
    path = tmp_path / "herd.sqlite3"
    database = Database(f"sqlite:///{path}")
    await database.write(lambda db: add_file(db, "a"))

    def fill(connection):
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no page more than there are
        for number in range(2000):
            add_file(connection, f"file-{number}")

    with pytest.raises(StorageFull, match="full"):
        await database.write(fill)
    page = await database.read(lambda db: select_page(db, tables.files, after=None, limit=9))
    assert names(page) == ["a"]
    database.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nonsense", "Expected a URL"),
        ("nonsense://host/name", "Expected a URL"),
        ("sqlite:////proc/herd.sqlite3", "cannot be used now"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/name", "cannot be used now"),
    ],
)
def test_a_database_that_is_not_there_is_told_without_its_password(url, text):
    with pytest.raises(DatabaseError, match=text) as caught:
        Database(url).open()
    assert "secret" not in str(caught.value)


async def test_a_server_that_goes_away_and_comes_back_is_found_again(postgres_url):
    database = Database(postgres_url)
    await database.write(lambda db: add_file(db, "a"))
    with database.engine.connect() as connection:  # ends every connection but its own
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND usename = 'herd'"
            )
        )
    await database.write(lambda db: add_file(db, "b"))
    tables.metadata.drop_all(database.engine)
    database.close()


async def test_uploads_and_jobs_at_once_on_sqlite(monkeypatch):
    loadable_adapters(monkeypatch)
    async with herd() as h:
        made = await asyncio.gather(
            *(create(h.client) for _ in range(6)), *(upload(h.client) for _ in range(6))
        )
        for job in made[:6]:
            await until_status(h.client, job.id, "succeeded")
