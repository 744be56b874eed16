"""Writing safetensors files: one file, or as many as the weights need, with their index.

Files are named as transformers names them: model.safetensors, or model-0000i-of-0000n.safetensors
and model.safetensors.index.json. Tensors of larger elements come first in a file, so that each is
aligned for readers that map it. Until that order is known they wait on the disk, not in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.checkpoint import INDEX_NAME, SINGLE_NAME
from engine.safetensors_header import DTYPE_BY_CODE

CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
MAX_SHARD_BYTES = 1_000_000_000
COPY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class SpooledTensor:
    """A tensor that waits for its file to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in the spool file."""
    num_bytes: int


def write_safetensors(path: Path, tensors: Mapping[str, SpooledTensor], spool: BinaryIO) -> None:
    """Write one file from what has been spooled.

    Raises:
        OSError: the disk is full or not writable.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": CODE_BY_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            spool.seek(tensors[name].start)
            num_left = tensors[name].num_bytes
            while num_left:
                piece = spool.read(min(num_left, COPY_BYTES))
                stream.write(piece)
                num_left -= len(piece)
        # Before the folder gets its name: after a power cut a file must be whole or not there.
        stream.flush()
        os.fsync(stream.fileno())


class ShardWriter:
    """Spools tensors and writes a file whenever enough are there; finish() names the files."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._spool: BinaryIO = (folder / "spool.partial").open("w+b")
        self._pending: dict[str, SpooledTensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors that stay together, such as a 4-bit weight and its quant state.

        Raises:
            OSError: the disk is full or not writable.
        """
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._spool.tell() + num_bytes > self._max_shard_bytes:
            self._flush()
        for name, tensor in tensors.items():
            start = self._spool.tell()
            flat = tensor.detach().contiguous().cpu().reshape(-1)
            self._spool.write(flat.view(torch.uint8).numpy().data)
            self._pending[name] = SpooledTensor(
                tensor.dtype, tuple(tensor.shape), start, tensor.nbytes
            )

    def finish(self) -> None:
        """Write what is left, then the index where there are several files.

        Raises:
            OSError: the disk is full or not writable.
        """
        self._flush()
        self.close()
        count = len(self._shards)
        if count == 1:
            self._shard_path(1).rename(self._folder / SINGLE_NAME)
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.partial"

    def close(self) -> None:
        """Drop what has been spooled; files that are written stay."""
        self._spool.close()
        (self._folder / "spool.partial").unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        self._total_bytes += self._spool.tell()
        write_safetensors(self._shard_path(len(self._shards)), self._pending, self._spool)
        self._spool.seek(0)
        self._spool.truncate()
        self._pending = {}
