"""4-bit copies of 16-bit checkpoints, so that the next start need not quantise again.

A copy lies in <cache>/<folder name>-<key>; the key hashes names, sizes and times of the source's
files and the settings, so a changed source has another copy. Whatever goes wrong here costs a
note, never the start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.model_config import ModelSpec
from engine.quantized_folder import QuantizedFolder, QuantSettings
from engine.tensor_plan import TensorPlan, plan_tensors
from kernels.nf4 import QuantizedWeight

FORMAT_VERSION = 1
"""Changes when copies written by an earlier version must not be used."""


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "herd" / "quantized"


def cached_folder(
    cache_dir: Path, src: Path, checkpoint: Checkpoint, settings: QuantSettings
) -> Path:
    """Where the copy of a checkpoint is, or would be."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(f"{FORMAT_VERSION} {settings.quant_type} {settings.double_quant}".encode())
    for file in [src / "config.json", *checkpoint.files]:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return cache_dir / f"{src.resolve().name}-{settings.quant_type}-{digest.hexdigest()}"


def open_cached(
    folder: Path, spec: ModelSpec, notes: list[str]
) -> tuple[Checkpoint, TensorPlan] | None:
    """The copy, checked; None when there is none or a damaged one, which is removed."""
    if not folder.is_dir():
        return None
    checkpoint = None
    try:
        checkpoint = Checkpoint(folder)
        plan = plan_tensors(checkpoint, spec)
    except CheckpointError as error:
        if checkpoint is not None:
            checkpoint.close()
        notes.append(f"The cached 4-bit copy was damaged and is made anew: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    notes.append(f"Loaded the cached 4-bit copy in {folder}.")
    return checkpoint, plan


class CacheWriter:
    """Writes a copy beside the loading. A failure ends it and becomes a note."""

    def __init__(
        self,
        folder: Path,
        src: Path,
        settings: QuantSettings,
        dtype: torch.dtype,
        needed_bytes: int,
        notes: list[str],
    ) -> None:
        self._folder = folder
        self._notes = notes
        self._writer: QuantizedFolder | None = None
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            self._writer = QuantizedFolder(src, partial, settings, dtype)
            self._writer.check_space(needed_bytes)
        except OSError as error:
            self._give_up(error)

    def add(self, name: str, value: torch.Tensor | QuantizedWeight) -> None:
        """Take one of the model's tensors, on the CPU and as stored."""
        if self._writer is not None:
            try:
                self._writer.add(name, value)
            except OSError as error:
                self._give_up(error)

    def finish(self) -> None:
        """Publish the copy."""
        if self._writer is None:
            return
        try:
            self._writer.publish(self._folder)
            self._notes.append(f"Kept the 4-bit copy in {self._folder}; the next start loads it.")
        except OSError as error:
            # Another process may have published the same copy meanwhile: that one serves as well.
            if not self._folder.is_dir():
                self._give_up(error)
        self.close()

    def close(self) -> None:
        """Remove whatever has not been published."""
        if self._writer is not None:
            self._writer.__exit__()
            self._writer = None

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._notes.append(
            f"The 4-bit copy could not be kept in {self._folder} ({error}); every start will "
            f"quantise again. --quantized-cache-dir chooses another place."
        )


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that died in the middle have left of this copy."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        try:
            os.kill(int(pid), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            continue  # someone else's, and alive
