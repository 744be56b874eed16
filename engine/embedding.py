"""The embedding table: in memory, or left in its file, from which a step reads its tokens' rows.

Of a large table a step needs a few rows. Left on the disk it takes no memory of the process; the
system's page cache has what is used of it, and the rest as long as there is room. Plain reads, no
mapping: a file that is cut or overwritten is an error message, neither a bus error nor wrong rows,
and one that is removed or replaced by another stays readable, because it is open.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import EngineError
from engine.safetensors_header import DTYPE_BY_CODE, TensorInfo

MIN_STORED_BYTES = 32 << 20
"""Smaller tables are held: they would spare little, and a read takes a microsecond for each token,
which only a large model does not notice."""
DISK_SYSTEMS = {
    "bcachefs": 0xCA451A4E, "btrfs": 0x9123683E, "ext": 0xEF53, "f2fs": 0xF2F52010,
    "overlay": 0x794C7630, "tmpfs": 0x01021994, "xfs": 0x58465342, "zfs": 0x2FC12FC1,
}  # fmt: skip
"""statfs' numbers of file systems on this machine's own disk or memory. Over a network a file may
change unseen, and a read may hang."""


class StoredTable:
    """A matrix in a safetensors file that stays open."""

    def __init__(self, descriptor: int, info: TensorInfo, dtype: torch.dtype) -> None:
        """
        Args:
            descriptor: of info.file, open for reading; closed with this object.
            info:       where the matrix lies.
            dtype:      of the rows that are handed out, whatever the file has.
        """
        weakref.finalize(self, os.close, descriptor)
        self.dtype = dtype
        self._descriptor = descriptor
        self._info = info
        self._stored_dtype = DTYPE_BY_CODE[info.dtype]
        self._stamp = self._read_stamp()

    def rows(self, indices: Tensor) -> Tensor:
        """The rows at int64 [n], as dtype [n, num_columns].

        Raises:
            EngineError: the file has been changed since it was opened, or cannot be read.
        """
        numbers = indices.tolist()
        num_rows, num_columns = self._info.shape
        assert min(numbers, default=0) >= 0 and max(numbers, default=0) < num_rows
        row_bytes = num_columns * self._stored_dtype.itemsize
        return self._read([number * row_bytes for number in numbers], row_bytes)

    def whole(self) -> Tensor:
        """The matrix, in memory of its own.

        Raises:
            EngineError: as rows'.
        """
        return self._read([0], self._info.num_bytes)

    def _read(self, starts: list[int], num_bytes: int) -> Tensor:
        """So many bytes from each start on: dtype [rows, num_columns]."""
        data = torch.empty(len(starts) * num_bytes, dtype=torch.uint8)
        view = data.numpy().data
        try:
            if self._read_stamp() != self._stamp:
                raise OSError("it was changed while its model is served")
            for index, start in enumerate(starts):
                piece = view[index * num_bytes : (index + 1) * num_bytes]
                read_exactly(self._descriptor, piece, self._info.offset + start)
        except OSError as error:
            raise EngineError(
                f"{self._info.file}: the embedding's rows cannot be read: {error}. Restart the "
                f"server, and replace the files of a model that is served only by renaming others."
            ) from error
        return data.view(self._stored_dtype).view(-1, self._info.shape[1]).to(self.dtype)

    def _read_stamp(self) -> tuple[int, int]:
        """What changes with the file's content: its size and time."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


Table = Tensor | StoredTable
"""[vocab_size, hidden_size]."""


def look_up(table: Table, input_ids: Tensor) -> Tensor:
    """Rows of the table for int64 [num_tokens]: [num_tokens, hidden_size], new memory.

    Raises:
        EngineError: they are in a file that cannot be read any more.
    """
    if isinstance(table, StoredTable):
        return table.rows(input_ids)
    return functional.embedding(input_ids, table)


def whole_table(table: Table) -> Tensor:
    """The table as a tensor; a stored one is read for that.

    Raises:
        EngineError: as look_up's.
    """
    return table.whole() if isinstance(table, StoredTable) else table


def can_stay(info: TensorInfo) -> bool:
    """Whether a table may be left in its file: it is large, and the file on a disk of our own."""
    return info.num_bytes >= MIN_STORED_BYTES and _is_on_disk(info)


def _is_on_disk(info: TensorInfo) -> bool:
    if sys.platform != "linux":
        return False
    status = (ctypes.c_ulong * 32)()  # struct statfs, of which the first word is the kind
    if ctypes.CDLL(None).statfs(os.fsencode(info.file), status):
        return False
    return status[0] & 0xFFFFFFFF in DISK_SYSTEMS.values()


def read_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` from an open file.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError("the file ends before the tensor does")
        done += count
