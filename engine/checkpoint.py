"""The safetensors files of a model folder: headers checked at once, tensors read one at a time.

Plain file reads into memory of our own, no mapping: peak memory is the tensor asked for, and a file
that is cut while we read is an error message, not a bus error.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.embedding import StoredTable, read_exactly
from engine.errors import CheckpointError
from engine.json_fields import read_json_object
from engine.safetensors_header import DTYPE_BY_CODE, TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPARE_BYTES = 1 << 20


class Checkpoint:
    """All tensors of a folder by name. Close it, or use it in a with statement."""

    def __init__(self, folder: Path) -> None:
        """Read the index and every header.

        Raises:
            CheckpointError: no safetensors files, a file missing, truncated or malformed, or a
                tensor not where the index says.
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
                    f"{file}: tensor {absent[0]}{_and_more(len(absent) - 1)} is missing, though "
                    f"{INDEX_NAME} says it is in this file. Download the folder again."
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
            CheckpointError: the file ends early or cannot be read, or the type is none that torch
                has here.
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

    def table(self, name: str, dtype: torch.dtype) -> StoredTable:
        """A matrix that stays where it is; its rows will be handed out as dtype."""
        info = self.tensors[name]
        return StoredTable(os.dup(self._open(info.file)), info, dtype)

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
            read_exactly(self._open(info.file), view, info.offset + start)
        except OSError as error:
            raise CheckpointError(
                f"{info.file}: tensor {name} cannot be read: {error}. Download the file again."
            ) from error

    def _open(self, file: Path) -> int:
        """Its descriptor; every tensor of a file is read through the same one."""
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]


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
            f"{folder}: found only pickled weights ({', '.join(pickles[:3])}"
            f"{_and_more(len(pickles) - 3)}). A pickle may run any code when it is opened and is "
            f"never read here. If you trust it, convert it with transformers: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    raise CheckpointError(
        f"{folder}: found neither {SINGLE_NAME} nor {INDEX_NAME}, one of which a model folder in "
        f"Hugging Face format has. Check the path or download the weights."
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
            f"{folder}: {len(missing)} of {len(files)} weight files are missing: "
            f"{', '.join(missing[:5])}{_and_more(len(missing) - 5)}. Download them into the folder."
        )
    return files


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
