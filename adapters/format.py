"""PEFT adapter folders: look at the header and say everything that is wrong, then read the tensors.

Public   inspect_adapter (header only, fast), read_adapter (tensors), AdapterInfo
Format   adapter_config.json and adapter_model.safetensors, as peft 0.21 and older versions write
Beside   adapters/writer.py writes it

peft itself loads what it can and warns about the rest; here an adapter that does not fit
completely is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    listed,
    read_chat_template,
    read_weights_header,
)
from adapters.layout import FINGERPRINT_KEY, Layout, module_shapes, sort_tensors
from adapters.layout_checks import check_layout
from adapters.pattern_check import are_quick
from adapters.peft_config import PeftConfig, read_config
from engine.errors import AdapterError
from engine.lora import EMBEDDING, LoraModule, LoraWeights
from engine.lora_placement import is_finite

if TYPE_CHECKING:
    from engine.api import AdapterRef
    from engine.model_config import ModelSpec

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What the header of an adapter says about it."""

    rank: int
    """The largest among its layers; 0 when it only replaces tensors."""
    alpha: float
    targets: tuple[str, ...]
    """Last names of the adapted or replaced layers: ("k_proj", "lm_head", "q_proj")."""
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
        path: folder in PEFT format.
        spec: the base.
        label: what errors call the adapter; the path by default.

    Raises:
        AdapterError: it cannot be served on this base; the message lists every problem found.
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
        chat_template=read_chat_template(folder),
        fingerprint=layout.fingerprint,
        is_guanaco=any("guanaco" in name.lower() for name in names),
    )


def read_adapter(path: str | Path, spec: ModelSpec, *, label: str | None = None) -> LoraWeights:
    """Read an adapter's tensors, alpha / r folded into B in float32; arguments as above.

    Raises:
        AdapterError: all that inspect_adapter refuses; tensors with NaN or infinite values, each
            named; an adapter that changes nothing.
    """
    folder = Path(path)
    label = label or str(folder)
    config, layout = _examine(folder, spec, label)
    try:
        tensors = _read_tensors(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{label}: {WEIGHTS_FILE} cannot be read: {error}.") from error
    broken = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise AdapterError(
            f"{label}: NaN or infinite values in {listed(broken)}. The training run diverged or "
            f"the file is damaged; use an earlier checkpoint."
        )
    modules = {}
    for module, keys in layout.modules.items():
        scaling = config.scaling(module)
        modules[module] = LoraModule(
            a=tensors[keys["a"]],
            b=tensors[keys["b"]].float() * scaling,
            magnitude=tensors[keys["magnitude"]] if "magnitude" in keys else None,
            bias=tensors[keys["bias"]].float() * scaling if "bias" in keys else None,
        )
    weights = LoraWeights(
        modules=modules,
        replaced={parameter: tensors[key] for parameter, key in layout.replaced.items()},
        base_copies={parameter: tensors[key] for parameter, key in layout.base_copies.items()},
        base_fingerprint=layout.fingerprint,
    )
    if not _has_effect(weights):
        raise AdapterError(
            f"{label}: this adapter changes nothing: every lora_B is zero, as before the first "
            f"training step, and no tensor is replaced. Save it after training, or serve the base."
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
    if not folder.is_dir():
        raise AdapterError(
            f"{label}: no such folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    problems: list[str] = []
    config = read_config(folder, problems)
    header = read_weights_header(folder, problems)
    layout = None
    if config is not None and not are_quick(config.regexes(), module_shapes(config, spec)):
        problems.append(
            "a regular expression of adapter_config.json takes too long to match; a repetition "
            "inside another, as in (x+)+, is the usual reason"
        )
    elif config is not None and header is not None:
        layout = sort_tensors(config, header.tensors, spec)
        layout.fingerprint = header.metadata.get(FINGERPRINT_KEY)
        check_layout(config, layout, header.tensors, spec, problems)
    if problems or config is None or layout is None:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "".join(f"\n- {problem}" for problem in shown)
        raise AdapterError(f"{label}: this adapter cannot be served on this base:{lines}")
    return config, layout


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        # Each in its own memory: the file may go away.
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def _has_effect(weights: LoraWeights) -> bool:
    """Whether training has moved anything; of DoRA's magnitudes only the base can tell."""
    if weights.replaced:
        return True
    for path, module in weights.modules.items():
        # Of an embedding's pair peft initialises A with zeros, of the others B.
        if bool(module.b.any()) and (path != EMBEDDING or bool(module.a.any())):
            return True
        if module.magnitude is not None or (module.bias is not None and bool(module.bias.any())):
            return True
    return False
