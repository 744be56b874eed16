"""Where run-time loads may read: the folders that the operator named, and nothing outside.

A path that leads out, by .. or through a symbolic link, is refused in the same words whether it
exists or not, so that the answer tells nothing about what is there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from adapters.folder import FILES, PICKLE_SUFFIXES, WEIGHTS_FILE
from engine.errors import AdapterError


def confine(path: str | Path, roots: Sequence[Path]) -> Path:
    """The real folder that a path means, which lies in one of the roots.

    Args:
        path: absolute, or relative to a root or to the working folder; the first match wins.
        roots: folders from which adapters may be loaded, and single files.

    Raises:
        AdapterError: the path leads out of every root, or nothing is there.
    """
    if not roots:
        raise AdapterError(
            "Adapters cannot be loaded while the server runs: it was started without "
            "--adapter-dir. Start it with the folder that holds them."
        )
    candidates = (_real_path(folder / path) for folder in (*roots, Path()))
    inside = [real for real in candidates if real is not None and is_inside(real, roots)]
    for real in inside:
        if os.path.isdir(real):
            return real
    shown = str(path)[:200]
    if inside:
        raise AdapterError(f"{shown}: no such folder in {_listed(roots)}.")
    raise AdapterError(
        f"{shown}: not in a folder from which adapters may be loaded: {_listed(roots)}."
    )


def is_inside(real_path: Path, roots: Iterable[Path]) -> bool:
    """Whether a path without links lies in one of the roots or is one."""
    real_roots = (_real_path(root) for root in roots)
    return any(root is not None and real_path.is_relative_to(root) for root in real_roots)


def startup_roots(folder: Path) -> tuple[Path, ...]:
    """What naming an adapter on the command line opens: its folder, and the files it links to.

    Folders in the model hub's cache consist of links into a folder of blobs beside them.
    """
    files = (_real_path(folder / name) for name in FILES)
    return (
        folder,
        *(file for file in files if file is not None and not is_inside(file, (folder,))),
    )


def copy_adapter(folder: Path, destination: Path, roots: Sequence[Path] | None) -> None:
    """Copy the files of an adapter; of pickle files only the names, so that errors can tell them.

    Args:
        folder: the adapter.
        destination: an empty folder.
        roots: every file must really lie in one of them; None: anywhere.

    Raises:
        AdapterError: a file is a link out of the roots, is not a plain file, or cannot be copied.
    """
    try:
        for name in FILES:
            if os.path.lexists(folder / name):
                _copy_file(folder / name, destination / name, roots)
        if not (destination / WEIGHTS_FILE).exists():
            for file in folder.iterdir():
                if file.suffix in PICKLE_SUFFIXES:
                    (destination / file.name).touch()
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be copied: {error.strerror or error}.") from error


def _copy_file(source: Path, destination: Path, roots: Sequence[Path] | None) -> None:
    real = _real_path(source)
    if real is None or (roots is not None and not is_inside(real, roots)):
        raise AdapterError(
            f"{source}: a link that leads out of the folders from which adapters may be loaded."
        )
    # Not blocking: opening a named pipe would wait for its other end for ever.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterError(f"{source}: not a plain file.")
        with destination.open("xb") as copy:
            shutil.copyfileobj(file, copy, 1024 * 1024)


def _real_path(path: Path) -> Path | None:
    """The path without links and dots; None when there can be no such path."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a zero byte
        return None


def _listed(roots: Sequence[Path]) -> str:
    return ", ".join(str(root) for root in roots if root.is_dir())
