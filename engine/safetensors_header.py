"""The header of a safetensors file: its tensors and where they lie, checked against its size.

Format   8 bytes little-endian header length, JSON header, then the tensors without gaps.
Source   the safetensors format description.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError

DTYPE_BY_CODE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; nothing of it is in memory."""

    file: Path
    offset: int
    """Bytes from the file's beginning."""
    num_bytes: int
    dtype: str
    """The format's code: F32, BF16, U8 ..."""
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: unreadable, truncated, or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            data_start = 8 + header_bytes
            if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES:
                raise _malformed(file, f"the header length {header_bytes} is not plausible")
            if file_bytes < data_start:
                raise _truncated(file, data_start, file_bytes)
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed(file, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _malformed(file, "the header is no object")
    infos = {
        name: _tensor_info(file, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = max((info.offset + info.num_bytes for info in infos.values()), default=data_start)
    if file_bytes < end:
        raise _truncated(file, end, file_bytes)
    return infos


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _malformed(file, f"the entry of tensor {name} is incomplete") from None
    numbers = (*shape, start, stop)
    if (
        not isinstance(dtype, str)
        or not all(type(n) is int and n >= 0 for n in numbers)
        or stop < start
    ):
        raise _malformed(file, f"the entry of tensor {name} is {json.dumps(entry)[:120]}")
    if dtype in DTYPE_BY_CODE:
        expected = DTYPE_BY_CODE[dtype].itemsize * math.prod(shape)
        if stop - start != expected:
            raise _malformed(
                file,
                f"tensor {name} takes {stop - start} bytes, its shape {list(shape)} {expected}",
            )
    return TensorInfo(file, data_start + start, stop - start, dtype, shape)


def _malformed(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: no valid safetensors file: {what}. Download it again.")


def _truncated(file: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        f"{file}: the file is truncated: its header needs {expected} bytes, found {found}. "
        f"Download it again."
    )
