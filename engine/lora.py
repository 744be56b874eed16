"""LoRA weights as the engine holds them, the pool of adapters on the device, and how a batch uses them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """The low-rank update of one linear layer: delta = x @ a.T @ b.T, alpha/r already folded into b."""

    a: torch.Tensor
    """[rank, in_features]; for an embedding [rank, vocab_size]."""
    b: torch.Tensor
    """[out_features, rank]; for an embedding [hidden_size, rank]."""
    magnitude: torch.Tensor | None = None
    """DoRA (arXiv:2402.09353): [out_features], the trained norm of each output row."""
    bias: torch.Tensor | None = None
    """lora_B.bias [out_features], already scaled; added to the delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One adapter, read from disk and checked; adapters/format.py produces it. Tensors are on the CPU."""

    modules: dict[str, LoraModule]
    """By module path in the base model: "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"."""
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    """Full tensors instead of the base's, by parameter path: "lm_head.weight", "score.weight",
    "model.embed_tokens.weight" (modules_to_save) and "....q_proj.bias" (bias="lora_only")."""
    base_fingerprint: str | None = None
    """Fingerprint of the base it was trained on, where the file names one."""
