"""A step's layers in one kernel call, adapters included, where kernels/decoder.py offers that.

What cannot run so, because of the model, the cache's type or an adapter with more than low-rank
parts, runs layer by layer in engine/layers.py; both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from engine.layers import DecoderLayer, FusedLinear
from engine.model_config import ModelSpec
from kernels.decoder import (
    Decoder,
    DecoderWeights,
    LayerWeights,
    StepAdapters,
    StepTensors,
    prepare_decoder,
)
from kernels.int8_linear import Int8Weight
from kernels.nf4 import QuantizedWeight

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.lora import LayerPlan, LoraBatch


def prepare_whole_step(
    spec: ModelSpec, layers: Sequence[DecoderLayer], norm: torch.Tensor
) -> WholeStep | None:
    """Describe the loaded layers to the kernels; None where there is no such kernel."""
    decoder = prepare_decoder(
        DecoderWeights(
            layers=[
                LayerWeights(
                    projections=tuple(_slices(fused) for fused in layer.projections),
                    input_norm=layer.input_layernorm,
                    post_norm=layer.post_attention_layernorm,
                    q_norm=layer.q_norm,
                    k_norm=layer.k_norm,
                    sliding_window=window,
                )
                for layer, window in zip(layers, spec.sliding_windows, strict=True)
            ],
            norm=norm,
            eps=spec.rms_norm_eps,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
    )
    if decoder is None:
        return None
    return WholeStep(decoder, [fused.paths for layer in layers for fused in layer.projections])


def _slices(
    fused: FusedLinear,
) -> list[tuple[QuantizedWeight | torch.Tensor, torch.Tensor | None]]:
    slices = []
    for part in fused.slices:
        assert part.weight is not None, f"{part.path} is not loaded"
        assert not isinstance(part.weight, Int8Weight), "only heads are 8-bit"
        slices.append((part.weight, part.bias))
    return slices


class WholeStep:
    """All layers of one model as one call."""

    def __init__(self, decoder: Decoder, projections: list[tuple[str, ...]]) -> None:
        self._decoder = decoder
        self._projections = projections
        self._first_plan: LayerPlan | None = None  # made anew whenever the pool changes
        self._plan: object | None = None
        self._other_rows: frozenset[int] = frozenset()

    def run(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        kv_caches: list[tuple[torch.Tensor, ...]],
        lora: LoraBatch | None,
    ) -> torch.Tensor | None:
        """All layers and the last norm: [num_tokens, hidden_size]; None where they must run one by
        one.
        """
        adapters = None
        if lora is not None:
            plan = self._plan_of(lora)
            if lora.touches(self._other_rows):
                return None
            if plan is not None:
                adapters = StepAdapters(
                    plan=plan, lora_indices=lora.lora_indices, lora_scales=lora.lora_scales
                )
        step = StepTensors(
            block_tables=batch.block_tables,
            context_lens=batch.context_lens,
            cu_seqlens_q=batch.cu_seqlens_q,
            slot_mapping=batch.slot_mapping,
        )
        return self._decoder.run(hidden, cos, sin, step, kv_caches, adapters)

    def _plan_of(self, lora: LoraBatch) -> object | None:
        """The pool's adapters for the kernels; None where none has a low-rank part here."""
        first = lora.plans(self._projections[:1])[0]
        if first is not self._first_plan:
            plans = lora.plans(self._projections)
            self._first_plan = first
            self._other_rows = frozenset(other[0] for plan in plans for other in plan.others)
            low_rank = frozenset[int]().union(*(plan.low_rank_rows for plan in plans))
            self._plan = None
            if low_rank:
                self._plan = self._decoder.plan_adapters([plan.slices for plan in plans])
                if self._plan is None:
                    self._other_rows |= low_rank
        return self._plan
