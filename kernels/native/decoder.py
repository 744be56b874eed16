"""kernels/decoder.py's Decoder in the native library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels.decoder import DecoderWeights, LayerWeights, StepAdapters, StepTensors
from kernels.layout import BLOCK
from kernels.lora import LoraSlice
from kernels.native import library as native
from kernels.native.arguments import HEAD_MULTIPLE, can_add, is_index, is_plain, lora_slices
from kernels.native.library import DTYPES, Matrix, dense_matrix, quantized_matrix
from kernels.nf4 import QuantizedWeight

NUM_PROJECTIONS = 4


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The pool's adapters as the library reads them."""

    slices: ctypes.Array[ctypes.c_void_p]
    """Address of each projection's slices, or null."""
    counts: ctypes.Array[ctypes.c_int64]
    num_rows: int
    owned: list[object]
    """What the addresses point into."""


class NativeDecoder:
    """All layers of one model. It keeps the weights that it points to."""

    @staticmethod
    def accepts_weights(weights: DecoderWeights) -> bool:
        """Whether every tensor is as the library reads it."""
        dtype = weights.norm.dtype
        return (
            weights.head_dim % HEAD_MULTIPLE == 0
            and is_plain(weights.norm)
            and all(_accepts_layer(layer, weights.norm) for layer in weights.layers)
            and dtype in DTYPES
        )

    def __init__(self, library: ctypes.CDLL, weights: DecoderWeights) -> None:
        self._library = library
        self._weights = weights
        self._dtype = weights.norm.dtype
        self._owned: list[object] = []
        layers = (native.Layer * len(weights.layers))(
            *(self._layer(layer) for layer in weights.layers)
        )
        self._owned.append(layers)
        gate_up = weights.layers[0].projections[2]
        width = sum(weight.shape[0] for weight, _ in gate_up)
        self._decoder = native.Decoder(
            ctypes.addressof(layers), weights.norm.data_ptr(), DTYPES[self._dtype], len(layers),
            len(weights.norm), width // 2, weights.num_heads, weights.num_kv_heads,
            weights.head_dim, weights.eps, weights.head_dim**-0.5,
        )  # fmt: skip
        self._caches_of: Sequence[tuple[Tensor, ...]] | None = None
        self._caches: ctypes.Array[ctypes.c_void_p] | None = None

    def _layer(self, layer: LayerWeights) -> native.Layer:
        projections = []
        for slices in layer.projections:
            matrices = (Matrix * len(slices))(
                *(
                    quantized_matrix(weight, bias)
                    if isinstance(weight, QuantizedWeight)
                    else dense_matrix(weight, bias)
                    for weight, bias in slices
                )
            )
            self._owned.append(matrices)
            projections.append(native.Projection(ctypes.addressof(matrices), len(slices)))
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        return native.Layer(
            *projections,
            *(None if norm is None else norm.data_ptr() for norm in norms),
            layer.sliding_window or 0,
        )

    def plan_adapters(self, projections: Sequence[Sequence[LoraSlice]]) -> AdapterPlan | None:
        """As kernels/decoder.py's Decoder says."""
        sizes = {len(part.rows) for slices in projections for part in slices}
        if len(sizes) != 1 or not all(
            can_add(part, self._dtype) for slices in projections for part in slices
        ):
            return None
        addresses = (ctypes.c_void_p * len(projections))()
        counts = (ctypes.c_int64 * len(projections))()
        owned: list[object] = [projections]
        for index, slices in enumerate(projections):
            if slices:
                described = lora_slices(slices)
                owned.append(described)
                addresses[index] = ctypes.addressof(described[0])
                counts[index] = len(slices)
        return AdapterPlan(addresses, counts, sizes.pop(), owned)

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        step: StepTensors,
        kv_caches: Sequence[tuple[Tensor, ...]],
        adapters: StepAdapters | None,
    ) -> Tensor | None:
        """As kernels/decoder.py's Decoder says."""
        if hidden.dtype != self._dtype or not self._knows(kv_caches):
            return None
        tables = step.block_tables
        assert is_index(tables) and is_index(step.context_lens) and is_index(step.cu_seqlens_q)
        assert cos.is_contiguous() and sin.is_contiguous() and step.slot_mapping.is_contiguous()
        out = hidden.clone()
        plan = adapters.plan if adapters is not None else None
        tokens = native.LoraTokens()
        if adapters is not None and isinstance(plan, AdapterPlan):
            tokens = native.LoraTokens(
                adapters.lora_indices.data_ptr(), adapters.lora_scales.data_ptr(), plan.num_rows
            )
        call = native.Step(
            out.data_ptr(), cos.data_ptr(), sin.data_ptr(), step.slot_mapping.data_ptr(),
            tables.data_ptr(), step.context_lens.data_ptr(), step.cu_seqlens_q.data_ptr(),
            ctypes.addressof(self._caches) if self._caches is not None else None,
            ctypes.addressof(plan.slices) if isinstance(plan, AdapterPlan) else None,
            ctypes.addressof(plan.counts) if isinstance(plan, AdapterPlan) else None,
            tokens, len(out), len(step.context_lens), tables.shape[1], kv_caches[0][0].shape[1],
        )  # fmt: skip
        self._library.herd_decode(ctypes.addressof(self._decoder), ctypes.addressof(call))
        return out

    def _knows(self, kv_caches: Sequence[tuple[Tensor, ...]]) -> bool:
        """Whether the caches can be used; their addresses are taken once."""
        if kv_caches is self._caches_of:
            return self._caches is not None
        self._caches_of, self._caches = kv_caches, None
        flat = [cache for pair in kv_caches for cache in pair]
        if all(is_plain(cache) and cache.dtype == self._dtype for cache in flat):
            self._caches = (ctypes.c_void_p * len(flat))(*(cache.data_ptr() for cache in flat))
        return self._caches is not None


def _accepts_layer(layer: LayerWeights, norm: Tensor) -> bool:
    dense = [layer.input_norm, layer.post_norm]
    dense += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    if len(layer.projections) != NUM_PROJECTIONS:
        return False
    for slices in layer.projections:
        for weight, bias in slices:
            if isinstance(weight, QuantizedWeight):
                if weight.layout != "interleaved":
                    return False
            else:
                dense.append(weight)
            if bias is not None:
                dense.append(bias)
            if weight.shape[1] % BLOCK:
                return False
    return is_plain(norm, *dense)
