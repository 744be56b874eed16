"""A 4-bit folder in bitsandbytes' format: written under a temporary name, published at once."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.bnb_format import weight_tensors
from engine.json_fields import read_json_object
from engine.memory import format_bytes
from engine.model_config import declared_dtype
from engine.shard_writer import MAX_SHARD_BYTES, ShardWriter
from kernels.codebooks import QuantType
from kernels.nf4 import QuantizedWeight

COPIED_SUFFIXES = (".json", ".jsonl", ".jinja", ".model", ".tiktoken", ".txt")
"""What belongs to a model folder besides weights: tokenizer, chat template, generation settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSettings:
    """How weights are quantised; the group size is 64, the only one that transformers writes."""

    quant_type: QuantType = "nf4"
    double_quant: bool = True


class QuantizedFolder:
    """A folder being written; it vanishes unless it is published."""

    def __init__(
        self,
        src: Path,
        partial: Path,
        settings: QuantSettings,
        dtype: torch.dtype,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Create the folder.

        Raises:
            OSError: it cannot be created.
        """
        self._src = src
        self._partial = partial
        self._settings = settings
        self._dtype = dtype
        partial.mkdir(parents=True)
        self._writer = ShardWriter(partial, max_shard_bytes)

    def __enter__(self) -> QuantizedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def check_space(self, needed_bytes: int) -> None:
        """Raises OSError when the disk has no room for so much, and for one file's spool."""
        free = shutil.disk_usage(self._partial).free
        needed_bytes += min(needed_bytes, MAX_SHARD_BYTES)
        if free < needed_bytes:
            raise OSError(
                f"{format_bytes(needed_bytes)} needed, {format_bytes(free)} free on the disk"
            )

    def add(self, name: str, value: torch.Tensor | QuantizedWeight) -> None:
        """Take one of the model's tensors and write it to the disk. Raises OSError."""
        if isinstance(value, QuantizedWeight):
            self._writer.add(weight_tensors(name, value))
        else:
            self._writer.add({name: value})

    def publish(self, dst: Path) -> None:
        """Finish the files and move the folder to its place at once. Raises OSError."""
        self._writer.finish()
        _write_companions(self._src, self._partial, self._settings, self._dtype)
        os.rename(self._partial, dst)


def _write_companions(src: Path, dst: Path, settings: QuantSettings, dtype: torch.dtype) -> None:
    """config.json with its quantization_config, and copies of the tokenizer and the like.

    Raises:
        OSError: the disk is full or not writable.
    """
    config = read_json_object(src / "config.json")
    if declared_dtype(config) is None:
        # Without it transformers would take the type of the first tensor, which may be a table.
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": settings.quant_type,
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (dst / "config.json").write_text(text + "\n", encoding="utf-8")
    for path in sorted(src.iterdir()):
        is_own = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in COPIED_SUFFIXES and not is_own:
            shutil.copyfile(path, dst / path.name)
