"""The safetensors files of a model folder: headers checked at once, tensors read one at a time.

Reading   plain file reads into memory of our own, no mapping: peak memory is the tensor asked for, and a file that
          is cut while we read is an error message, not a bus error.
Writing   ShardWriter fills model-0000i-of-0000n.safetensors and the index, as transformers names them.
Format    8 bytes little-endian header length, JSON header, then the tensors without gaps; larger element sizes first,
          so that every tensor is aligned. Source: the safetensors format description.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.json_fields import read_json_object

DTYPE_BY_CODE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
CODE_BY_DTYPE = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_SHARD_BYTES = 1_000_000_000
COMPARE_BYTES = 1 << 20


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


class Checkpoint:
    """All tensors of a folder by name. Close it, or use it in a with statement."""

    def __init__(self, folder: Path) -> None:
        """Read the index and every header.

        Raises:
            CheckpointError: no safetensors files, a file missing, truncated or malformed, or a tensor not where the
                index says.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        for file, wanted in _weight_files(folder).items():
            infos = read_header(file)
            names = infos if wanted is None else wanted
            absent = [name for name in names if name not in infos]
            if absent:
                raise CheckpointError(
                    f"{file}: tensor {absent[0]} is missing, though {INDEX_NAME} says it is in this file"
                    f"{_and_more(len(absent) - 1)}. Download the folder again."
                )
            self.tensors.update({name: infos[name] for name in names})

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, as stored.

        Raises:
            CheckpointError: the file ends early or cannot be read, or the type is none that torch has here.
        """
        info = self.tensors[name]
        dtype = DTYPE_BY_CODE.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{info.file}: tensor {name} has type {info.dtype}; "
                f"supported are {', '.join(DTYPE_BY_CODE)}. Convert the checkpoint."
            )
        data = torch.empty(info.num_bytes, dtype=torch.uint8)
        self._read_into(name, data.numpy().data, 0)
        return data.view(dtype).view(info.shape)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same type, shape and bytes; read in small pieces."""
        one, two = self.tensors[first], self.tensors[second]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        for start in range(0, one.num_bytes, COMPARE_BYTES):
            size = min(COMPARE_BYTES, one.num_bytes - start)
            pieces = [bytearray(size), bytearray(size)]
            for name, piece in zip((first, second), pieces, strict=True):
                self._read_into(name, memoryview(piece), start)
            if pieces[0] != pieces[1]:
                return False
        return True

    def _read_into(self, name: str, view: memoryview, start: int) -> None:
        """Fill `view` with a tensor's bytes from `start` on."""
        info = self.tensors[name]
        try:
            if info.file not in self._descriptors:
                self._descriptors[info.file] = os.open(info.file, os.O_RDONLY)
            done = 0
            while done < len(view):
                count = os.preadv(
                    self._descriptors[info.file], [view[done:]], info.offset + start + done
                )
                if count == 0:
                    raise OSError("the file ends before the tensor does")
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: tensor {name} cannot be read: {error}. Download the file again."
            ) from error


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files to read, each with the tensors the index wants from it (None: all of them)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Check the path of the base model.")
    if (folder / SINGLE_NAME).exists():
        return {folder / SINGLE_NAME: None}
    if (folder / INDEX_NAME).exists():
        return _indexed_files(folder)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: found only pickled weights ({', '.join(pickles[:3])}{_and_more(len(pickles) - 3)}), which may "
            f"run code when they are opened and are never read here. Convert them where you trust them: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
        )
    raise CheckpointError(
        f"{folder}: found neither {SINGLE_NAME} nor {INDEX_NAME}. A model folder in Hugging Face format has one of "
        f"them; check the path or download the weights."
    )


def _indexed_files(folder: Path) -> dict[Path, list[str] | None]:
    index_path = folder / INDEX_NAME
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map: expected an object from tensor to file name."
        )
    files: dict[Path, list[str] | None] = {}
    for name, file_name in weight_map.items():
        # A bare name only: an index must not point out of its folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_path}: tensor {name}: expected a file name, found {file_name!r}."
            )
        names = files.setdefault(folder / file_name, [])
        assert names is not None
        names.append(name)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}"
            f"{_and_more(len(missing) - 5)}. Download them into the folder."
        )
    return files


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
        expected = DTYPE_BY_CODE[dtype].itemsize
        for size in shape:
            expected *= size
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
        f"{file}: the file is truncated: its header needs {expected} bytes, found {found}. Download it again."
    )


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file without copying the tensors, which are on the CPU.

    Raises:
        OSError: the disk is full or not writable.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": CODE_BY_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            flat = tensors[name].detach().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


class ShardWriter:
    """Collects tensors and writes a file whenever enough are there; finish() names the files and writes the index."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors that stay together, such as a 4-bit weight and its quant state.

        Raises:
            OSError: the disk is full or not writable.
        """
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + num_bytes > self._max_shard_bytes:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += num_bytes

    def finish(self) -> None:
        """Write what is left, then the index where there are several files."""
        self._flush()
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

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        write_safetensors(self._shard_path(len(self._shards)), self._pending)
        self._total_bytes += self._pending_bytes
        self._pending = {}
        self._pending_bytes = 0
