"""What each tensor of a PEFT file is.

Keys      base_model.model.<module path>.lora_A.weight [r, in], .lora_B.weight [out, r],
          .lora_B.bias [out], .lora_magnitude_vector [out] (DoRA); for the embedding
          .lora_embedding_A [r, vocab], .lora_embedding_B [hidden, r]
Replaced  <module path>.weight and .bias of modules_to_save; .base_layer.bias of bias="lora_only"
Copies    the embedding's and the head's own matrices, which peft stores whenever they are adapted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.folder import TensorHeader
from adapters.peft_config import PeftConfig
from engine.lora import EMBEDDING, SCORE_HEAD

if TYPE_CHECKING:
    from engine.model_config import ModelSpec

PREFIX = "base_model.model."
FINGERPRINT_KEY = "herd_base_fingerprint"
"""In the safetensors metadata: the base that an adapter was trained on."""
PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
}
VOCABULARY_MODULES = (EMBEDDING, "lm_head")


@dataclass(slots=True)
class Layout:
    """The keys of a file, by what they are."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """By module path: the keys of its parts a, b, bias and magnitude."""
    replaced: dict[str, str] = field(default_factory=dict)
    """By parameter path."""
    base_copies: dict[str, str] = field(default_factory=dict)
    """By parameter path."""
    unexpected: list[str] = field(default_factory=list)
    """Keys of tensors that mean nothing to this base."""
    fingerprint: str | None = None

    def target_names(self) -> tuple[str, ...]:
        """Last names of all modules that are adapted or replaced, sorted."""
        paths = [*self.modules, *(parameter.rpartition(".")[0] for parameter in self.replaced)]
        return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def module_shapes(config: PeftConfig, spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The shapes of all weights that an adapter of this task may touch, by module path."""
    shapes = {**spec.linear_shapes(), EMBEDDING: spec.embedding_shape}
    if config.task_type == "SEQ_CLS":  # such a model has a score head and no other
        del shapes["lm_head"]
        shapes[SCORE_HEAD] = (1, spec.hidden_size)
    return shapes


def sort_tensors(
    config: PeftConfig, tensors: Mapping[str, TensorHeader], spec: ModelSpec
) -> Layout:
    """Find out what each tensor is, by its key alone."""
    shapes = module_shapes(config, spec)
    layout = Layout()
    for key in tensors:
        path, part = _split(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX) or path not in shapes:
            layout.unexpected.append(key)
        elif part in PARTS:
            layout.modules.setdefault(path, {})[PARTS[part]] = key
        elif part in ("bias", "base_layer.bias"):
            layout.replaced[f"{path}.bias"] = key
        elif part == "weight" and (config.saves(path) or path == SCORE_HEAD):
            layout.replaced[f"{path}.weight"] = key
        elif part in ("weight", "base_layer.weight") and path in VOCABULARY_MODULES:
            layout.base_copies[f"{path}.weight"] = key
        else:
            layout.unexpected.append(key)
    return layout


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as (module path, part)."""
    for part in (*PARTS, "base_layer.weight", "base_layer.bias"):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    path, _, part = name.rpartition(".")
    return path, part
