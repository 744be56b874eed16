"""Operations of the native library in the shape that kernels/dispatch.py asks for.

Each pair accepts or declines what the operation's own file has checked, then runs it. Taken are
float32 and bfloat16 on the CPU and contiguous weights; anything else is the reference's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.decoder import DecoderWeights
from kernels.int8_linear import Int8Weight
from kernels.layout import BLOCK, Layout
from kernels.lora import LoraSlice
from kernels.native import library as native
from kernels.native.arguments import (
    HEAD_MULTIPLE,
    can_add,
    has_whole_rows,
    is_index,
    is_plain,
    lora_slices,
)
from kernels.native.decoder import NativeDecoder
from kernels.native.library import (
    DTYPES,
    Arena,
    Matrix,
    dense_matrix,
    int8_matrix,
    quantized_matrix,
)
from kernels.nf4 import QuantizedWeight
from kernels.truncation import sum_rows


class NativeOperations:
    """The operations of one loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._arena = Arena()

    # Layout and codec.

    def accepts_relayout(self, packed: Tensor, *_: object) -> bool:
        """Whether relayout can run."""
        return packed.device.type == "cpu" and packed.is_contiguous()

    def relayout(self, packed: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
        """kernels/layout.py's relayout."""
        is_back = layout == "stock"
        out = torch.empty_like(packed) if is_back else self._arena.allocate(len(packed))
        self._library.herd_relayout(
            packed.data_ptr(), out.data_ptr(), shape[0], shape[1] // 2, is_back
        )
        return out

    def accepts_prepare_weight(self, weight: QuantizedWeight) -> bool:
        """Whether the interleaved layout can hold the weight: no group may span rows."""
        return (
            weight.device.type == "cpu"
            and weight.group_size % BLOCK == 0
            and weight.shape[1] % weight.group_size == 0
        )

    def prepare_weight(self, weight: QuantizedWeight) -> QuantizedWeight:
        """kernels/nf4_linear.py's prepare_weight."""
        return weight.in_layout("interleaved")

    def accepts_dequantize_4bit(self, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """Whether dequantize_4bit can run."""
        return weight.layout == "interleaved" and dtype in DTYPES

    def dequantize_4bit(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """kernels/nf4.py's dequantize_4bit."""
        out = torch.empty(weight.shape, dtype=dtype)
        matrix = quantized_matrix(weight, None)
        self._library.herd_dequantize(DTYPES[dtype], ctypes.byref(matrix), out.data_ptr())
        return out

    # Projections.

    def accepts_nf4_linear(self, x: Tensor, weights: Sequence[QuantizedWeight], *_: object) -> bool:
        """Whether nf4_linear can run."""
        return (
            x.dtype in DTYPES
            and all(weight.layout == "interleaved" for weight in weights)
            and self._knows_activations(weights)
        )

    def _knows_activations(self, weights: Sequence[QuantizedWeight]) -> bool:
        """Whether x can be rounded as the weights say: all the same, as it is done once."""
        kinds = {weight.int8_activations for weight in weights}
        return kinds <= {False} or (kinds == {True} and self.has_int8_activations())

    def accepts_has_int8_activations(self) -> bool:
        """Whether has_int8_activations can run."""
        return True

    def has_int8_activations(self) -> bool:
        """kernels/nf4_linear.py's has_int8_activations."""
        return bool(self._library.herd_has_int8_activations())

    def nf4_linear(
        self, x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
    ) -> Tensor:
        """kernels/nf4_linear.py's nf4_linear."""
        matrices = [
            quantized_matrix(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        ]
        return self._linear(x, matrices, sum(weight.shape[0] for weight in weights))

    def accepts_linear(self, x: Tensor, weight: Tensor, *_: object) -> bool:
        """Whether linear can run."""
        return (
            x.dtype in DTYPES
            and x.device.type == "cpu"
            and x.shape[1] % BLOCK == 0
            and weight.is_contiguous()
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """kernels/linear.py's linear."""
        return self._linear(x, [dense_matrix(weight, bias)], weight.shape[0])

    def accepts_int8_linear(self, x: Tensor, weight: Int8Weight, *_: object) -> bool:
        """Whether int8_linear can run."""
        return self.accepts_linear(x, weight.codes)

    def int8_linear(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        """kernels/int8_linear.py's int8_linear."""
        return self._linear(x, [int8_matrix(weight, bias)], weight.shape[0])

    def _linear(self, x: Tensor, matrices: list[Matrix], width: int) -> Tensor:
        x, y = x.contiguous(), x.new_empty(len(x), width)
        array = (Matrix * len(matrices))(*matrices)
        self._library.herd_linear(
            DTYPES[x.dtype], array, len(matrices), x.data_ptr(), len(x), y.data_ptr(), width
        )
        return y

    # Between the products.

    def accepts_rms_norm(self, x: Tensor, weight: Tensor, *_: object) -> bool:
        """Whether rms_norm can run."""
        return is_plain(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """kernels/fused.py's rms_norm."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._library.herd_rms_norm(
            DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), eps, x.numel() // size, size,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def accepts_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *_: object) -> bool:
        """Whether add_rms_norm can run."""
        return is_plain(x, residual, weight)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """kernels/fused.py's add_rms_norm."""
        out, sums = torch.empty_like(x), torch.empty_like(x)
        size = x.shape[-1]
        self._library.herd_add_rms_norm(
            DTYPES[x.dtype], x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps,
            x.numel() // size, size, out.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        return out, sums

    def accepts_apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether apply_rotary can run."""
        floats = cos.dtype == sin.dtype == torch.float32
        return floats and is_plain(cos, sin) and has_whole_rows(q) and has_whole_rows(k)

    def apply_rotary(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """kernels/fused.py's apply_rotary."""
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = x.new_empty(x.shape)
        self._library.herd_rotate(
            DTYPES[x.dtype], x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), *x.shape,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def accepts_silu_and_mul(self, gate_up: Tensor) -> bool:
        """Whether silu_and_mul can run."""
        return is_plain(gate_up) and gate_up.dim() == 2

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """kernels/fused.py's silu_and_mul."""
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_tokens, size)
        self._library.herd_silu_and_mul(
            DTYPES[gate_up.dtype], gate_up.data_ptr(), num_tokens, size, out.data_ptr()
        )
        return out

    # Choosing tokens.

    def accepts_nucleus_floors(self, probs: Tensor, top_p: Tensor) -> bool:
        """Whether nucleus_floors can run."""
        return is_plain(probs) and probs.dtype == top_p.dtype == torch.float32

    def nucleus_floors(self, probs: Tensor, top_p: Tensor) -> Tensor:
        """kernels/truncation.py's nucleus_floors."""
        totals = sum_rows(probs)
        floors = probs.new_empty(probs.shape[0])
        self._library.herd_nucleus_floors(
            probs.data_ptr(), *probs.shape, totals.data_ptr(), top_p.data_ptr(), floors.data_ptr()
        )
        return floors

    # The KV cache.

    def accepts_write_kv_cache(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> bool:
        """Whether write_kv_cache can run."""
        return (
            is_plain(k_cache, v_cache)
            and k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
            and has_whole_rows(k)
            and has_whole_rows(v)
            and slot_mapping.is_contiguous()
        )

    def write_kv_cache(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """kernels/paged_attention.py's write_kv_cache."""
        num_tokens, num_kv_heads, head_dim = k.shape
        self._library.herd_write_kv(
            DTYPES[k.dtype], k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0),
            k_cache.data_ptr(), v_cache.data_ptr(), slot_mapping.data_ptr(), num_tokens,
            num_kv_heads * head_dim,
        )  # fmt: skip

    def accepts_paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        *_: object,
    ) -> bool:
        """Whether paged_attention can run."""
        return (
            is_plain(k_cache, v_cache)
            and q.dtype == k_cache.dtype == v_cache.dtype
            and has_whole_rows(q)
            and q.shape[2] % HEAD_MULTIPLE == 0
            and is_index(block_tables)
            and is_index(context_lens)
            and is_index(cu_seqlens_q)
        )

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """kernels/paged_attention.py's paged_attention."""
        out = q.new_empty(q.shape)
        _, block_size, num_kv_heads, head_dim = k_cache.shape
        call = native.Attention(
            q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
            block_tables.data_ptr(), context_lens.data_ptr(), cu_seqlens_q.data_ptr(),
            q.stride(0), out.stride(0), block_tables.shape[1], len(context_lens),
            q.shape[1], num_kv_heads, head_dim, block_size, sliding_window or 0, scale,
        )  # fmt: skip
        self._library.herd_attention(DTYPES[q.dtype], ctypes.addressof(call))
        return out

    # All layers of a step.

    def accepts_prepare_decoder(self, weights: DecoderWeights) -> bool:
        """Whether all layers can run in one call."""
        projections = (slices for layer in weights.layers for slices in layer.projections)
        return NativeDecoder.accepts_weights(weights) and all(
            self._knows_activations([w for w, _ in slices if isinstance(w, QuantizedWeight)])
            for slices in projections
        )

    def prepare_decoder(self, weights: DecoderWeights) -> NativeDecoder:
        """kernels/decoder.py's prepare_decoder."""
        return NativeDecoder(self._library, weights)

    def accepts_free_scratch(self) -> bool:
        """Whether free_scratch can run."""
        return True

    def free_scratch(self) -> None:
        """kernels/scratch.py's free_scratch."""
        self._library.herd_free_scratch()

    # Adapters.

    def accepts_add_lora(
        self,
        y: Tensor,
        x: Tensor,
        slices: Sequence[LoraSlice],
        lora_indices: Tensor,
        lora_scales: Tensor,
    ) -> bool:
        """Whether add_lora can run."""
        return (
            is_plain(x)
            and y.dtype == x.dtype
            and y.stride(1) == 1
            and x.shape[1] % BLOCK == 0
            and is_index(lora_indices)
            and lora_scales.dtype == torch.float32
            and lora_scales.is_contiguous()
            and len({len(part.rows) for part in slices}) == 1
            and all(can_add(part, x.dtype) for part in slices)
        )

    def add_lora(
        self,
        y: Tensor,
        x: Tensor,
        slices: Sequence[LoraSlice],
        lora_indices: Tensor,
        lora_scales: Tensor,
    ) -> None:
        """kernels/lora.py's add_lora."""
        parts, _pairs = lora_slices(slices)
        tokens = native.LoraTokens(
            lora_indices.data_ptr(), lora_scales.data_ptr(), len(slices[0].rows)
        )
        self._library.herd_add_lora(
            DTYPES[x.dtype], y.data_ptr(), y.stride(0), x.data_ptr(), *x.shape,
            ctypes.addressof(parts), len(slices), ctypes.addressof(tokens),
        )  # fmt: skip
