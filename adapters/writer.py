"""Write an adapter as peft does, so that peft and everything that reads its format can load it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from adapters.folder import CHAT_TEMPLATE_FILE, CONFIG_FILE, WEIGHTS_FILE
from adapters.layout import FINGERPRINT_KEY, PREFIX
from engine.lora import EMBEDDING, LoraWeights
from engine.train.config import TrainConfig


def write_adapter(
    path: str | Path,
    weights: LoraWeights,
    *,
    base_model: str | None,
    alpha: float | None = None,
    use_rslora: bool = False,
    task_type: str = "CAUSAL_LM",
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and, where given, chat_template.jinja.

    Args:
        path:          folder; made where it is missing, its files replaced.
        weights:       alpha / r is folded into their B; it is divided out again.
        base_model:    what adapter_config.json calls the base.
        alpha:         lora_alpha of the file; by default each layer's rank, a scale of one.
        use_rslora:    the scale is alpha / sqrt(r) instead of alpha / r.
        task_type:     SEQ_CLS for a reward adapter with a score head.
        chat_template: the adapter's own.
        dtype:         of the tensors in the file.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    ranks = {module: lora.a.shape[0] for module, lora in weights.modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alphas = {module: float(r if alpha is None else alpha) for module, r in ranks.items()}
    for module, lora in weights.modules.items():
        r = ranks[module]
        scaling = alphas[module] / (math.sqrt(r) if use_rslora else r)
        is_embedding = module == EMBEDDING
        name = f"{PREFIX}{module}"
        tensors[f"{name}.lora_embedding_A" if is_embedding else f"{name}.lora_A.weight"] = lora.a
        b = lora.b.float() / scaling
        tensors[f"{name}.lora_embedding_B" if is_embedding else f"{name}.lora_B.weight"] = b
        if lora.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = lora.magnitude
        if lora.bias is not None:
            tensors[f"{name}.lora_B.bias"] = lora.bias.float() / scaling
    for parameter, tensor in {**weights.base_copies, **weights.replaced}.items():
        tensors[_key(parameter, weights)] = tensor
    common_alpha = float(rank if alpha is None else alpha)
    saved = [p.removesuffix(".weight") for p in weights.replaced if p.endswith(".weight")]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(common_alpha),
        "lora_dropout": 0.0,
        "use_rslora": use_rslora,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {_exactly(m): r for m, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {
            _exactly(m): _number(value)
            for m, value in sorted(alphas.items())
            if value != common_alpha
        },
        "bias": "lora_only" if any(p.endswith(".bias") for p in weights.replaced) else "none",
        "lora_bias": any(lora.bias is not None for lora in weights.modules.values()),
        "use_dora": any(lora.magnitude is not None for lora in weights.modules.values()),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    metadata = {"format": "pt"}
    if weights.base_fingerprint is not None:
        metadata[FINGERPRINT_KEY] = weights.base_fingerprint
    # Copies: safetensors refuses tensors that share memory, as those of tied layers do.
    copies = {
        key: tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    unfinished = folder / f"{WEIGHTS_FILE}.tmp"
    save_file(copies, unfinished, metadata=metadata)
    unfinished.replace(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def write_trained(
    path: Path,
    weights: LoraWeights,
    config: TrainConfig,
    chat_template: str | None,
    *,
    base_model: str,
) -> None:
    """write_adapter for an adapter that is being trained: what serve.py hands to the worker.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        write_adapter(
            path,
            weights,
            base_model=base_model,
            alpha=config.alpha,
            use_rslora=config.use_rslora,
            task_type="SEQ_CLS" if config.method == "reward" else "CAUSAL_LM",
            chat_template=chat_template,
        )
    except SafetensorError as error:  # its own name for a disk that is full
        raise OSError(f"{WEIGHTS_FILE}: {error}") from error


def _key(parameter: str, weights: LoraWeights) -> str:
    """What peft calls a parameter of the base; in an adapted layer it lies in its base_layer."""
    path, _, kind = parameter.rpartition(".")
    if path in weights.modules:
        return f"{PREFIX}{path}.base_layer.{kind}"
    return f"{PREFIX}{parameter}"


def _exactly(module: str) -> str:
    """A pattern for peft that means this module and no other."""
    return "^" + module.replace(".", r"\.")


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
