"""One generation of an adapter: a copy of its files, made before it is published, never changed.

Whatever happens to the folder it came from, requests that use a generation find the same weights.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from adapters.confine import copy_adapter
from adapters.format import AdapterInfo, inspect_adapter
from engine.api import AdapterRef
from engine.errors import AdapterError

if TYPE_CHECKING:
    from engine.model_config import ModelSpec


PREFIX = "herd-adapters-"
LOCK_FILE = "lock"
MIN_STALE_S = 60.0  # a folder that another server has just made may not be locked yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prepared or published state of an adapter."""

    ref: AdapterRef
    info: AdapterInfo
    source: str
    """The folder it was copied from."""
    created_at: float
    """Unix time."""


class GenerationFolder:
    """Where the copies lie: a folder of our own, removed when the server ends."""

    def __init__(self, spec: ModelSpec, parent: Path | None) -> None:
        self._spec = spec
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = _lock(self._folder)  # for as long as this process lives
        _remove_stale(self._folder.parent)
        self.close = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        """Removes every copy; happens by itself at exit."""

    def take(
        self,
        name: str,
        uid: int,
        generation: int,
        source: str | Path,
        roots: Sequence[Path] | None,
    ) -> Generation:
        """Copy an adapter's files and check the copy.

        Raises:
            AdapterError: the files cannot be copied, or the adapter does not fit the base.
        """
        folder = self._folder / f"{uid}-{generation}"
        try:
            folder.mkdir()
            copy_adapter(Path(source), folder, roots)
            info = inspect_adapter(folder, self._spec, label=f"{name} ({source})")
        except OSError as error:
            self.remove(folder)
            raise AdapterError(f"{source}: cannot be copied to {folder}: {error}.") from error
        except AdapterError:
            self.remove(folder)
            raise
        ref = AdapterRef(uid=uid, generation=generation, name=name, path=str(folder))
        return Generation(ref=ref, info=info, source=str(source), created_at=time.time())

    def remove(self, folder: str | Path) -> None:
        """Delete one copy."""
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> IO[str] | None:
    """Lock a server's folder; None where another process holds it or it is not there."""
    try:
        file = (folder / LOCK_FILE).open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return file


def _remove_stale(parent: Path) -> None:
    """Delete what servers left behind that were killed: folders that nobody holds any more."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            status = (folder / LOCK_FILE).lstat()
        except OSError:
            continue
        is_ours = status.st_uid == os.getuid() and time.time() - status.st_mtime > MIN_STALE_S
        lock = _lock(folder) if is_ours else None
        if lock is not None:
            with lock:
                shutil.rmtree(folder, ignore_errors=True)
