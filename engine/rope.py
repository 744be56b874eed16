"""Rotary position embedding: what a config says about it, and the angular frequencies that follow.

Kinds    default; linear (all frequencies divided by a factor); llama3 (long wavelengths divided,
         short ones kept, a smooth ramp between). Others are refused: dynamic and longrope change
         already cached keys with the length.
Layout   half rotation, as transformers has it: element i pairs with i + head_dim / 2.
Source   RoFormer, arXiv:2104.09864; linear scaling, arXiv:2306.15595; llama3: Llama 3.1's
         published rope_scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.json_fields import Fields

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one model; the fields below theta matter to some kinds only."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians per position, float32 [head_dim / 2]: pair i turns by element i at each step."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind == "llama3":
            return self._llama3(inv_freq)
        return inv_freq

    def _llama3(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Slow what turns less than low_freq_factor times in the original context."""
        wavelength = 2 * math.pi / inv_freq
        turns = self.original_max_position_embeddings / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * inv_freq / self.factor + smooth * inv_freq


def read_rope(config: Fields, max_position_embeddings: int) -> RopeSpec:
    """The rotary embedding named by a config, in either spelling.

    Published checkpoints have rope_theta and rope_scaling; transformers 5 writes rope_parameters,
    with rope_theta inside. Problems are recorded in `config`.
    """
    # Where both are present transformers takes rope_scaling. "type" is the older name of rope_type.
    scaling = config.child("rope_scaling" if config.get("rope_scaling") else "rope_parameters")
    theta = config.number("rope_theta", default=10000.0, above=0.0)
    theta = scaling.number("rope_theta", default=theta, above=0.0)
    for fields in (config, scaling):
        if fields.number("partial_rotary_factor", default=1.0) != 1.0:
            fields.problem("partial_rotary_factor", "1.0, as no partial rotation is supported")
    for name in scaling:
        if isinstance(scaling.get(name), Mapping):
            scaling.problem(name, "no nested object: one rotary embedding for all layers")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SUPPORTED_ROPE_TYPES:
        field = "type" if scaling.get("rope_type") is None else "rope_type"
        supported = (
            f"one of {', '.join(SUPPORTED_ROPE_TYPES)}; without it the trained length is served"
        )
        scaling.problem(field, supported, found=kind)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=scaling.number("factor", above=0.0))
    if kind != "llama3":
        return RopeSpec(theta=theta)
    low = scaling.number("low_freq_factor", above=0.0)
    high = scaling.number("high_freq_factor", above=0.0)
    if high <= low:
        scaling.problem("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    original = scaling.integer("original_max_position_embeddings", default=max_position_embeddings)
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=scaling.number("factor", above=0.0),
        low_freq_factor=low,
        high_freq_factor=high,
        # Where it also stands beside the rope's object, that one counts, as in transformers.
        original_max_position_embeddings=config.integer(
            "original_max_position_embeddings", default=original
        ),
    )
