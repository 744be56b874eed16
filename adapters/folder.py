"""The files of an adapter folder: which there are, the header of the weights, the chat template.

adapter_model.bin and other pickle files can run code: they are named in errors and never opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
"""All that is ever read of an adapter."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MAX_TEXT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as the file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling: F32, BF16 ..."""


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """What adapter_model.safetensors says of itself."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_weights_header(folder: Path, problems: list[str]) -> WeightsHeader | None:
    """Names, shapes and dtypes of the tensors; None where there are none, and why in problems."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        problems.append(_missing_weights(folder))
        return None
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            tensors = {
                key: TensorHeader(tuple(found.get_shape()), found.get_dtype())
                for key, found in slices.items()
            }
            return WeightsHeader(tensors, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        problems.append(
            f"{WEIGHTS_FILE} is truncated or damaged ({error}); copy or download it again"
        )
        return None


def read_chat_template(folder: Path) -> str | None:
    """The folder's own chat template: its file, or the one in tokenizer_config.json.

    Raises:
        AdapterError: a file is too large, or not what its name says.
    """
    text = _read_text(folder / CHAT_TEMPLATE_FILE)
    if text is not None:
        return text
    path = folder / TOKENIZER_CONFIG_FILE
    text = _read_text(path)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON: {error}. Remove or repair it.") from error
    template = fields.get("chat_template") if isinstance(fields, dict) else None
    if isinstance(template, list):  # the older form: several templates with names
        named = [item for item in template if isinstance(item, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def listed(names: Sequence[str]) -> str:
    """Up to four names for an error message."""
    shown = ", ".join(name[:200] for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _missing_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return f"{WEIGHTS_FILE} is missing"
    return (
        f"{listed(pickles)}: pickle files can run code and are never read. Load the adapter with "
        f"peft and save it again, which writes {WEIGHTS_FILE}"
    )


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise AdapterError(f"{path}: larger than {MAX_TEXT_BYTES} bytes. Remove or repair it.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}. Remove or repair it.") from error
