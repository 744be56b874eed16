"""All decoder layers of a step in one call, where an implementation offers that.

A call from Python costs microseconds, and a step of a small model makes hundreds. What the layers
are is described once; then a step passes its tensors. There is no reference here: it is the layers
themselves (engine/layers.py), which run where no implementation accepts the model or the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.dispatch import dispatch
from kernels.lora import LoraSlice
from kernels.nf4 import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer."""

    projections: tuple[Sequence[tuple[QuantizedWeight | Tensor, Tensor | None]], ...]
    """(weight, bias) of the slices of q|k|v, o, gate|up and down."""
    input_norm: Tensor
    """[hidden_size], as post_norm."""
    post_norm: Tensor
    q_norm: Tensor | None
    """[head_dim], as k_norm."""
    k_norm: Tensor | None
    sliding_window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All layers and the norm after them."""

    layers: Sequence[LayerWeights]
    norm: Tensor
    """[hidden_size]."""
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What attention needs to know of a step; shapes as in kernels/paged_attention.py."""

    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdapters:
    """The adapters of a step: what kernels/lora.py's add_lora takes, for every projection."""

    plan: object
    """From the decoder's plan_adapters."""
    lora_indices: Tensor
    lora_scales: Tensor


class Decoder(Protocol):
    """All layers, ready to run."""

    def plan_adapters(self, projections: Sequence[Sequence[LoraSlice]]) -> object | None:
        """Describe the pool's adapters once, for all steps until the pool changes.

        Args:
            projections: slices of each layer's q|k|v, o, gate|up and down; empty where no adapter
                has a part.

        Returns:
            What StepAdapters takes, or None where these adapters cannot be run.
        """

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        step: StepTensors,
        kv_caches: Sequence[tuple[Tensor, ...]],
        adapters: StepAdapters | None,
    ) -> Tensor | None:
        """Run every layer and the last norm.

        Args:
            hidden:    [num_tokens, hidden_size], embedded tokens; not changed.
            cos, sin:  float32 [num_tokens, head_dim / 2].
            kv_caches: (k_cache, v_cache) of each layer, then scales where 8-bit; written into.

        Returns:
            hidden's shape and dtype, or None where these tensors cannot be run.
        """


def prepare_decoder(weights: DecoderWeights) -> Decoder | None:
    """The fastest way to run these layers in one call; None where there is none."""
    return dispatch("prepare_decoder", lambda _: None, weights)
