"""Where the server keeps what must outlive it: uploaded files, jobs with their checkpoints, the
database.

    files/<file id>      bytes of a file; <file id>.part while it is being uploaded
    jobs/<job id>/       tokenised data, checkpoints, the trained adapter
    herd.sqlite3         unless --database names another place
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError

log = logging.getLogger("herd.data")
DATABASE_FILE = "herd.sqlite3"
UNFINISHED = ".part"
MAX_UPLOAD_AGE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The folder; its parts are made when they are first needed."""

    path: Path

    def file(self, file_id: str) -> Path:
        return self._part("files") / file_id

    def job(self, job_id: str) -> Path:
        return self._part("jobs") / job_id

    def database_url(self) -> str:
        return f"sqlite:///{self.path / DATABASE_FILE}"

    def remove_unfinished(self) -> None:
        """Delete what uploads left behind that a crash interrupted."""
        for path in (self.path / "files").glob(f"*{UNFINISHED}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > MAX_UPLOAD_AGE_S:
                    path.unlink()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold a lock of that name among all servers with this folder; whether it could be had."""
        with (self.path / f"{name}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def _part(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def open_data_folder(given: str | None, default: Path) -> DataFolder:
    """Make the folder where it is missing and see that it can be written.

    Args:
        given: --data-dir.
        default: taken without it; where it cannot be written a temporary folder takes its place,
            so that a server with a read-only home still serves.

    Raises:
        EngineError: the folder that was given cannot be written.
    """
    folder = Path(given).expanduser() if given is not None else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        if given is not None:
            raise EngineError(
                f"--data-dir {given}: cannot be written: {reason}. Name another folder."
            ) from error
        folder = Path(tempfile.mkdtemp(prefix="herd-data-"))
        log.warning(
            "%s cannot be written (%s): files, jobs and fine-tuned models of this run lie in %s "
            "and are not found again by the next. Name a folder with --data-dir.",
            default,
            reason,
            folder,
        )
    return DataFolder(Path(os.path.abspath(folder)))
