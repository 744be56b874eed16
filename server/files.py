"""Files of the API: rows in the database, bytes in the data folder.

The bytes are complete on the disk before the row appears, and the row goes before the bytes do:
whatever happens in between, a row never names bytes that are not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from server.data_folder import UNFINISHED, DataFolder
from server.database import Database
from server.errors import ApiError
from server.tables import files, insert, select_one, select_page
from server.uploads import disk_error

MAX_FILENAME_CHARS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    id: str
    created_at: int
    """Unix time, as all times here."""
    expires_at: int | None
    filename: str
    purpose: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {"object": "file", **asdict(self), "status": "processed", "status_details": None}


class Files:
    """All files of the server."""

    def __init__(self, database: Database, folder: DataFolder) -> None:
        self._database = database
        self._folder = folder

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie whose id a row has given."""
        return self._folder.file(file_id)

    def new_id(self) -> str:
        return f"file-{uuid.uuid4().hex[:24]}"

    def unfinished_path(self, file_id: str) -> Path:
        """Where to put the bytes before `add`.

        Raises:
            ApiError, StorageFull: the data folder cannot be written.
        """
        try:
            return self._folder.file(file_id + UNFINISHED)
        except OSError as error:
            raise disk_error(error, self._folder.path / "files") from error

    async def add(
        self, file_id: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> FileRecord:
        """Make a file of the bytes at `unfinished_path`.

        Raises:
            ApiError, EngineError: the disk or the database refuses it; the bytes are gone then.
        """
        unfinished, path = self.unfinished_path(file_id), self.path(file_id)
        now = int(time.time())
        try:
            record = FileRecord(
                id=file_id,
                created_at=now,
                expires_at=None if expires_after_s is None else now + expires_after_s,
                filename=_plain_name(filename),
                purpose=purpose,
                bytes=unfinished.stat().st_size,
            )
            await asyncio.to_thread(_settle, unfinished, path)
            await self._database.write(
                lambda connection: insert(connection, files, **asdict(record))
            )
        except BaseException as error:
            for leftover in (unfinished, path):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            if isinstance(error, OSError):
                raise disk_error(error, path) from error
            raise
        return record

    async def add_bytes(self, filename: str, content: bytes, purpose: str) -> FileRecord:
        """Make a file of the server's own; errors as for `add`."""
        file_id = self.new_id()
        path = self.unfinished_path(file_id)
        try:
            await asyncio.to_thread(path.write_bytes, content)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise disk_error(error, path) from error
        return await self.add(file_id, filename, purpose)

    async def get(self, file_id: str, param: str | None = None) -> FileRecord:
        """One file.

        Args:
            param: what an error names as the parameter at fault.

        Raises:
            ApiError: 404, there is none, or it has expired.
        """
        row = await self._database.read(
            lambda connection: select_one(connection, files, files.c.id == file_id, _is_alive())
        )
        if row is None:
            text = f"No such File object: {file_id[:100]}."
            raise ApiError(404, text, code="file_not_found", param=param or "file_id")
        return _record(row)

    async def page(
        self, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileRecord], bool]:
        """A page of the list, and whether there are more.

        Raises:
            LookupError: `after` is not in the list.
        """
        conditions = [_is_alive()]
        if purpose is not None:
            conditions.append(files.c.purpose == purpose)
        rows, has_more = await self._database.read(
            lambda connection: select_page(
                connection, files, *conditions, after=after, limit=limit, newest_first=newest_first
            )
        )
        return [_record(row) for row in rows], has_more

    async def delete(self, file_id: str) -> None:
        """Forget a file and its bytes.

        Raises:
            ApiError: 404, there is none.
        """
        await self.get(file_id)
        await self._database.write(
            lambda connection: connection.execute(files.delete().where(files.c.id == file_id))
        )
        await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)

    async def remove_expired(self) -> None:
        """Forget files whose time has come; nobody sees them any more even before that."""

        def take(connection: sa.Connection) -> list[str]:
            ids = list(connection.scalars(sa.select(files.c.id).where(~_is_alive())))
            connection.execute(files.delete().where(files.c.id.in_(ids)))
            return ids

        for file_id in await self._database.write(take):
            await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)


def _is_alive() -> sa.ColumnElement[bool]:
    return sa.func.coalesce(files.c.expires_at, 2**62) > int(time.time())


def _record(row: dict[str, Any]) -> FileRecord:
    return FileRecord(**{name: row[name] for name in FileRecord.__slots__})


def _plain_name(filename: str) -> str:
    """The last part of what a client called its file, without control characters."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    name = "".join(char for char in name if char.isprintable())
    return name[-MAX_FILENAME_CHARS:] or "file"


def _settle(unfinished: Path, path: Path) -> None:
    """Give complete bytes their name; they are on the disk before it."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.rename(path)
