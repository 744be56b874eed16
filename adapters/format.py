"""PEFT adapter folders: look at the header and say everything that is wrong with it, then read the tensors.

Public   inspect_adapter (header only, fast), read_adapter (tensors), AdapterInfo; writing is in adapters/writer.py
Format   adapter_config.json and adapter_model.safetensors, as peft 0.21 and older versions write them
Never    unpickled, never code: adapter_model.bin is refused by name

peft itself loads what it can and warns about the rest; here an adapter that does not fit completely is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from adapters.layout import FINGERPRINT_KEY, Layout, TensorHeader, read_layout
from adapters.peft_config import CONFIG_FILE, PeftConfig, read_config
from engine.errors import AdapterError
from engine.lora import EMBEDDING, LoraModule, LoraWeights

if TYPE_CHECKING:
    from engine.api import AdapterRef
    from engine.model_config import ModelSpec

WEIGHTS_FILE = "adapter_model.safetensors"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
"""All that is ever read of an adapter folder."""
MAX_TEXT_BYTES = 4 * 1024 * 1024
MAX_PROBLEMS = 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What the header of an adapter says about it."""

    rank: int
    """The largest among its layers; 0 when it only replaces tensors."""
    alpha: float
    targets: tuple[str, ...]
    """Names of the adapted or replaced layers, without their place: ("k_proj", "lm_head", "q_proj")."""
    num_bytes: int
    """Size of its weights file."""
    task_type: str | None
    base_model: str | None
    """What the base was called where the adapter was trained."""
    has_score_head: bool
    chat_template: str | None
    """The template in the adapter's own folder, where there is one."""
    fingerprint: str | None
    """Of the base it was trained on, where the file names one."""
    is_guanaco: bool
    """Whether its name, path or base says that it was trained on Guanaco's dialogues."""


def inspect_adapter(path: str | Path, spec: ModelSpec, *, label: str | None = None) -> AdapterInfo:
    """Check an adapter folder against a base model without reading its tensors.

    Args:
        path:  folder in PEFT format.
        spec:  the base.
        label: what errors call it; the path by default.

    Raises:
        AdapterError: the adapter cannot be served on this base; the message lists every problem found.
    """
    folder = Path(path)
    config, layout = _examine(folder, spec, label or str(folder))
    names = (folder.name, config.base_model or "", label or "")
    return AdapterInfo(
        rank=max((config.rank(module) for module in layout.modules), default=0),
        alpha=config.lora_alpha,
        targets=layout.target_names(),
        num_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        task_type=config.task_type,
        base_model=config.base_model,
        has_score_head="score.weight" in layout.replaced,
        chat_template=_chat_template(folder),
        fingerprint=layout.fingerprint,
        is_guanaco=any("guanaco" in name.lower() for name in names),
    )


def read_adapter(path: str | Path, spec: ModelSpec, *, label: str | None = None) -> LoraWeights:
    """Read an adapter's tensors, alpha / r folded into B in float32; arguments as above.

    Raises:
        AdapterError: all that inspect_adapter refuses, tensors with NaN or infinite values, each named, and an
            adapter that changes nothing.
    """
    folder = Path(path)
    label = label or str(folder)
    config, layout = _examine(folder, spec, label)
    broken: list[str] = []
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:

        def read(key: str | None) -> torch.Tensor | None:
            if key is None:
                return None
            tensor = file.get_tensor(key).clone()  # its own memory: the file may go away
            if not bool(torch.isfinite(tensor).all()):
                broken.append(key)
            return tensor

        modules = {}
        for module_path, keys in layout.modules.items():
            a, b, bias = read(keys.a), read(keys.b), read(keys.bias)
            assert a is not None and b is not None
            scaling = config.scaling(module_path)
            modules[module_path] = LoraModule(
                a=a,
                b=b.float() * scaling,
                magnitude=read(keys.magnitude),
                bias=None if bias is None else bias.float() * scaling,
            )
        replaced = {parameter: read(key) for parameter, key in layout.replaced.items()}
        base_copies = {parameter: read(key) for parameter, key in layout.base_copies.items()}
    if broken:
        raise AdapterError(
            f"{label}: NaN or infinite values in {_listed(broken)}. The training run diverged or the file is damaged; "
            f"use an earlier checkpoint."
        )
    weights = LoraWeights(
        modules=modules,
        replaced={
            parameter: tensor for parameter, tensor in replaced.items() if tensor is not None
        },
        base_copies={
            parameter: tensor for parameter, tensor in base_copies.items() if tensor is not None
        },
        base_fingerprint=layout.fingerprint,
    )
    if not _has_effect(weights):
        raise AdapterError(
            f"{label}: this adapter changes nothing: every lora_B is zero, as before the first training step, and no "
            f"tensor is replaced. Save it after training, or serve the base."
        )
    return weights


def read_ref(ref: AdapterRef, spec: ModelSpec) -> LoraWeights:
    """read_adapter for a published generation; what serve.py hands to the engine worker."""
    return read_adapter(ref.path, spec, label=f"Adapter {ref.name!r}")


def _examine(folder: Path, spec: ModelSpec, label: str) -> tuple[PeftConfig, Layout]:
    """Both files of an adapter, understood.

    Raises:
        AdapterError: with every problem.
    """
    problems: list[str] = []
    if not folder.is_dir():
        raise AdapterError(
            f"{label}: no such folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    config = read_config(folder, problems)
    header = _read_header(folder, problems)
    layout = None
    if config is not None and header is not None:
        tensors, metadata = header
        layout = read_layout(config, tensors, metadata.get(FINGERPRINT_KEY), spec, problems)
    if problems or config is None or layout is None:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "".join(f"\n- {problem}" for problem in shown)
        raise AdapterError(f"{label}: this adapter cannot be served on this base:{lines}")
    return config, layout


def _read_header(
    folder: Path, problems: list[str]
) -> tuple[dict[str, TensorHeader], dict[str, str]] | None:
    """Names, shapes and dtypes of the tensors, and the file's metadata."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            problems.append(
                f"{_listed(pickles)}: pickle files can run code and are never read. Load the adapter with peft and save it "
                f"again, which writes {WEIGHTS_FILE}"
            )
        else:
            problems.append(f"{WEIGHTS_FILE} is missing")
        return None
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            tensors = {
                key: TensorHeader(tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()
            }
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        problems.append(
            f"{WEIGHTS_FILE} is truncated or damaged ({error}); copy or download it again"
        )
        return None


def _has_effect(weights: LoraWeights) -> bool:
    if weights.replaced:
        return True
    for path, module in weights.modules.items():
        # Of an embedding's pair peft initialises A with zeros, of the others B.
        if module.magnitude is not None or (module.bias is not None and bool(module.bias.any())):
            return True
        if bool(module.b.any()) and (path != EMBEDDING or bool(module.a.any())):
            return True
    return False


def _chat_template(folder: Path) -> str | None:
    """The folder's own chat template: its file, or the one in tokenizer_config.json.

    Raises:
        AdapterError: a file is too large or not text.
    """
    for name in (CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE):
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise AdapterError(
                f"{path}: larger than {MAX_TEXT_BYTES} bytes; remove it or repair it."
            )
        try:
            text = path.read_text(encoding="utf-8")
            if name == CHAT_TEMPLATE_FILE:
                return text
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(
                f"{path}: cannot be read: {error}. Remove it or repair it."
            ) from error
        template = fields.get("chat_template") if isinstance(fields, dict) else None
        if isinstance(template, str):
            return template
        if isinstance(template, list):  # the older form with several named templates
            named = {
                item.get("name"): item.get("template")
                for item in template
                if isinstance(item, dict)
            }
            default = named.get("default")
            return default if isinstance(default, str) else None
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
