"""From what a user types to a folder: a path, the model or adapter folder, an alias, the model hub.

Only files that are data are ever downloaded: safetensors, JSON, tokenizers, templates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from engine.errors import AdapterError, CheckpointError

DEMO = Path(__file__).resolve().parents[1] / "demo"
DEMO_BASE = "demo"

BASE_ALIASES = {f"llama-{size}": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")}
BASE_ALIASES["llama-33b"] = BASE_ALIASES["llama-30b"]
# The authors' name for LLaMA's third size is its true one.
GUANACO_SIZES = {"7b": "7b", "13b": "13b", "30b": "33b", "33b": "33b", "65b": "65b"}

DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]
NOT_DOWNLOADED = ["*/*", "consolidated*"]  # training checkpoints, second copies of the weights
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_base(name: str, model_dir: str | Path | None) -> Path:
    """The folder of a base model.

    Args:
        name: a folder, a name in model_dir, "demo", an alias such as llama-7b, or the id of a
            Hugging Face repository.
        model_dir: --model-dir.

    Raises:
        CheckpointError: not found; the message lists everything that was tried.
    """
    if name == DEMO_BASE:
        return DEMO / "model"
    tried: list[str] = []
    folders = [
        Path(os.path.expanduser(name)),
        *([Path(model_dir) / name] if model_dir is not None else []),
    ]
    for path in folders:
        if _has_file(path, "config.json", tried):
            return path
    repository = BASE_ALIASES.get(name.lower(), name)
    folder = _download(repository, tried)
    if folder is None:
        raise CheckpointError(_not_found("base model", name, tried))
    return folder


def resolve_adapter(name: str, base: str, adapter_dirs: Sequence[str | Path]) -> Path:
    """The folder of an adapter.

    Args:
        name: a folder, a name in one of adapter_dirs, a demo adapter, guanaco, or the id of a
            Hugging Face repository.
        base: --base as the user gave it; it decides about demo adapters and Guanaco's size.
        adapter_dirs: --adapter-dir.

    Raises:
        AdapterError: not found; the message lists everything that was tried.
    """
    tried: list[str] = []
    folders = [Path(os.path.expanduser(name)), *(Path(folder) / name for folder in adapter_dirs)]
    if base == DEMO_BASE and NAME.fullmatch(name):
        folders.append(DEMO / "adapters" / name)
    for path in folders:
        if _has_file(path, CONFIG_FILE, tried):
            return path
    repository = name
    if name.lower() == "guanaco":
        size = _llama_size(base)
        if size is None:
            tried.append(
                f"the alias guanaco: trained on the first LLaMA of 7b, 13b, 33b or 65b, and "
                f"{base!r} does not say that it is one of them"
            )
        else:
            repository = f"timdettmers/guanaco-{GUANACO_SIZES[size]}"
    folder = _download(repository, tried)
    if folder is None:
        raise AdapterError(_not_found("adapter", name, tried))
    if not (folder / WEIGHTS_FILE).exists():
        raise AdapterError(
            f"{repository} has no {WEIGHTS_FILE}. Older repositories hold only pickle files, which "
            f"can run code and are never read: load it with peft where you trust it, save it "
            f"again, and name that folder."
        )
    return folder


def parse_adapter(text: str) -> tuple[str, str]:
    """--adapter NAME[=PATH] as (name, what to resolve); without NAME the last part of the path.

    Raises:
        AdapterError: the name is not allowed.
    """
    name, separator, source = text.partition("=")
    if not separator or "/" in name:
        name, source = Path(text).name, text
    if not source:
        raise AdapterError(f"--adapter {text}: nothing after '='; expected NAME=PATH or NAME.")
    check_name(name)
    return name, source


def check_name(name: str) -> None:
    """Names stand in URLs, metrics and log lines: letters, digits and . _ : - only, no slash.

    Raises:
        AdapterError: the name has other characters, none, or too many.
    """
    if not NAME.fullmatch(name):
        raise AdapterError(
            f"Adapter name {name[:140]!r}: expected 1 to 128 letters, digits or . _ : - with a "
            f"letter or digit first. Name it with NAME=PATH."
        )


def _llama_size(base: str) -> str | None:
    """7b, 13b, 30b, 33b or 65b, where a base's name says that it is the first LLaMA of that size.

    Its successors have layers of the same shapes, so that a wrong choice would not show.
    """
    name = base.lower()
    size = re.search(r"(?<![\d.])(7|13|30|33|65)b\b", name)
    is_successor = re.search(r"llama[-_ ]?v?[2-9](?!\d*b)", name) is not None
    return size[0] if size is not None and "llama" in name and not is_successor else None


def _has_file(folder: Path, file: str, tried: list[str]) -> bool:
    try:
        if (folder / file).is_file():
            return True
        tried.append(
            f"{folder}: " + (f"a folder without {file}" if folder.is_dir() else "no such folder")
        )
    except (OSError, ValueError) as error:
        tried.append(f"{folder}: {error}")
    return False


def _download(repository: str, tried: list[str]) -> Path | None:
    """A repository of the Hugging Face hub, from its cache or downloaded, with progress bars.

    None where it cannot be had; the reason is in tried.
    """
    if not REPOSITORY.fullmatch(repository):
        tried.append(f"{repository[:200]!r} is not a repository id (owner/name)")
        return None
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(repository, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)
        )
    # The hub's own errors are HTTP or OS errors too: no such repository, gated, not in the cache.
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        tried.append(f"Hugging Face repository {repository}: {reason}")
        return None


def _not_found(what: str, name: str, tried: Sequence[str]) -> str:
    lines = "".join(f"\n- {line}" for line in tried)
    return (
        f"No {what} {name[:200]!r}. Tried:{lines}\n"
        f"Name a folder, or download it where there is a network and name that."
    )
