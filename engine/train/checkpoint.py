"""Checkpoints of a training job: an adapter that can be served, and all that is needed to go on.

Folder    checkpoint-<step>/, inside the job's folder: a PEFT adapter, trainer_state.safetensors
          (masters and optimizer state, bit for bit) and trainer_state.json (the rest, and size and
          checksum of every other file). `final` is the result: the adapter and trainer_state.json.
Whole     A folder is written under a hidden name, synchronised with the disk and renamed: under its
          own name it is complete or not there. Damage after that shows in the checksums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.lora import LoraWeights
from engine.train.config import TrainConfig

FORMAT = "herd-trainer-1"
STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trainer_state.safetensors"
FINAL = "final"
READ_BYTES = 1 << 22

WriteAdapter = Callable[[Path, LoraWeights, TrainConfig], None]
"""Writes a PEFT folder; injected, because the engine does not import adapters. Raises OSError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a job is, after whole steps; everything random is a function of the seed and this."""

    config: TrainConfig
    """Resolved."""
    base_fingerprint: str
    data_digest: str
    """Of the training data."""
    step: int = 0
    trained_tokens: int = 0
    num_skipped_steps: int = 0
    skipped_in_a_row: int = 0
    micro_batch_tokens: int
    """Less than the config's where memory ran out."""
    evaluated_step: int = 0
    """Step of the last evaluation."""
    best_step: int | None = None
    best_value: float | None = None
    """Lower is better."""
    evaluations_since_best: int = 0
    metrics: tuple[tuple[str, float], ...] = ()
    """Of the last step, and of the evaluation after it."""

    @property
    def has_waited_enough(self) -> bool:
        """Whether early stopping ends the run here."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says why."""


def finite_metrics(metrics: dict[str, float]) -> tuple[tuple[str, float], ...]:
    """Metrics as a state keeps them: what is not finite is left out, JSON has no name for it."""
    return tuple((name, value) for name, value in metrics.items() if math.isfinite(value))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"checkpoint-{step}"


def save_checkpoint(
    folder: Path,
    state: TrainerState,
    weights: LoraWeights,
    tensors: dict[str, torch.Tensor],
    write_adapter: WriteAdapter,
) -> Path:
    """Write a checkpoint of state.step; it appears whole or not at all.

    Raises:
        OSError: the disk is full or not writable; nothing of the attempt is left.
    """
    path = checkpoint_path(folder, state.step)
    with _unfinished(path) as unfinished:
        write_adapter(unfinished, weights, state.config)
        host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        save_file(host, unfinished / TENSORS_FILE)
        _write_state(unfinished, state)
    return path


def publish_final(folder: Path, source: Path) -> Path:
    """Copy a checkpoint's adapter to `final`, in place of an earlier one. Raises OSError."""
    path = folder / FINAL
    with _unfinished(path) as unfinished:
        for file in source.iterdir():
            if file.name != TENSORS_FILE:
                shutil.copyfile(file, unfinished / file.name)
    return path


def load_checkpoint(path: Path) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """Read a checkpoint's state and tensors (on the CPU), and check its files.

    Raises:
        DamagedCheckpoint: a file is missing, or is not as it was written.
    """
    state = read_state(path)
    try:
        return state, load_file(path / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{TENSORS_FILE}: {error}") from error


def read_state(path: Path) -> TrainerState:
    """Read trainer_state.json and check the other files there are against it.

    Raises:
        DamagedCheckpoint: a file is missing (but the tensors, in `final`) or not as it was written.
    """
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DamagedCheckpoint(f"{STATE_FILE} has format {content['format']!r}")
        for name, expected in content["files"].items():
            if path.name == FINAL and name == TENSORS_FILE:
                continue
            if _checksum(path / name) != expected:
                raise DamagedCheckpoint(f"{name} is not as it was written")
        return _state_from_json(content["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {error}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a job, newest first; unfinished attempts are not among them."""
    steps = {}
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            steps[int(match[1])] = path
    return [steps[step] for step in sorted(steps, reverse=True)]


def prune_checkpoints(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints and the best, and what a killed process left behind."""
    for path in list_checkpoints(folder)[keep:]:
        if best_step is None or path != checkpoint_path(folder, best_step):
            shutil.rmtree(path, ignore_errors=True)
    remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what an attempt to write that was killed has left behind."""
    for path in folder.glob(".*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A folder that takes the name `path`, in place of what is there, when all went well.

    Raises:
        OSError: it could not be written; safetensors' own error for it among them.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():
            _synchronise(file)
        _synchronise(unfinished)
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
        _synchronise(path.parent)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_state(path: Path, state: TrainerState) -> None:
    files = {file.name: _checksum(file) for file in sorted(path.iterdir())}
    content = {"format": FORMAT, "state": dataclasses.asdict(state), "files": files}
    text = json.dumps(content, indent=2, allow_nan=False)
    (path / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def _state_from_json(fields: dict[str, Any]) -> TrainerState:
    config = dict(fields.pop("config"))
    config["target_modules"] = tuple(config["target_modules"])
    fields["metrics"] = tuple((name, value) for name, value in fields["metrics"])
    return TrainerState(config=TrainConfig(**config), **fields)


def _checksum(path: Path) -> list[int]:
    """[size in bytes, CRC-32]: finds damage, not malice."""
    checksum = 0
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(READ_BYTES), b""):
            checksum = zlib.crc32(piece, checksum)
    return [path.stat().st_size, checksum]


def _synchronise(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder, and needs no such thing
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
