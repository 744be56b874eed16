"""The decoder layer and its projections, which are fused over 4-bit or dense slices.

Plain Python objects, not nn.Modules: they hold no trainable parameter, and a decode step at batch
1 feels each microsecond of call overhead. Tensors are used under torch.inference_mode, which the
runner enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.head import Weight
from engine.model_config import ModelSpec
from kernels.attention_input import rotate_and_cache
from kernels.fused import add_rms_norm, rms_norm, silu_and_mul
from kernels.int8_linear import Int8Weight, int8_linear
from kernels.linear import linear
from kernels.nf4 import QuantizedWeight
from kernels.nf4_linear import nf4_linear, prepare_weight
from kernels.paged_attention import paged_attention

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.lora import LoraBatch


@dataclass(slots=True)
class LinearSlice:
    """One linear layer of the checkpoint, a slice of the fused projection that runs it."""

    path: str
    """Module path, as adapters name it: "model.layers.0.self_attn.q_proj"."""
    out_features: int
    in_features: int
    weight: Weight | None = None
    """4-bit, 8-bit (heads only), or dense [out_features, in_features]; None until it is loaded."""
    bias: torch.Tensor | None = None
    """[out_features]."""


class FusedLinear:
    """Linear layers that share their input, in one call: q|k|v, gate|up, or a single one.

    4-bit slices stay separate tensors, because each has its own nested offset. Dense slices become
    row ranges of one stacked weight, allocated before the first is copied in, so that loading
    never holds a projection twice.
    """

    def __init__(self, slices: Sequence[LinearSlice]) -> None:
        self.slices = tuple(slices)
        self.paths = tuple(part.path for part in slices)
        self.weights: list[QuantizedWeight] = []
        self.biases: list[torch.Tensor | None] = []
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._is_mixed = False

    def set_weight(self, part: LinearSlice, weight: Weight, device: torch.device) -> None:
        """Take one slice's weight: dense ones are copied into the stack, others kept."""
        if isinstance(weight, QuantizedWeight):
            part.weight = prepare_weight(weight.to(device))
            return
        if isinstance(weight, Int8Weight):
            part.weight = weight
            return
        if len(self.slices) == 1:
            part.weight = weight.to(device)
            return
        if self.weight is None:
            num_rows = sum(other.out_features for other in self.slices)
            self.weight = torch.empty(num_rows, part.in_features, dtype=weight.dtype, device=device)
        start = 0
        for other in self.slices:
            if other is part:
                break
            start += other.out_features
        part.weight = self.weight[start : start + part.out_features]
        part.weight.copy_(weight)

    def finish(self) -> None:
        """Choose how to run, once every slice is there."""
        self.biases = [part.bias for part in self.slices]
        quantized = [
            part.weight for part in self.slices if isinstance(part.weight, QuantizedWeight)
        ]
        if len(quantized) == len(self.slices):
            self.weights = quantized
            self._is_mixed = len({(w.quant_type, w.group_size) for w in quantized}) > 1
        elif quantized:
            # Some slices were kept 16-bit by the checkpoint's skip list: no stack, a call each.
            self._is_mixed = True
            for part in self.slices:
                if isinstance(part.weight, torch.Tensor):
                    part.weight = part.weight.clone()
            self.weight = None
        elif isinstance(self.slices[0].weight, Int8Weight):
            self._is_mixed = True
        else:
            if len(self.slices) == 1:
                weight = self.slices[0].weight
                assert isinstance(weight, torch.Tensor)
                self.weight = weight
            present = [bias for bias in self.biases if bias is not None]
            self.bias = torch.cat(present) if present else None

    def __call__(self, x: torch.Tensor, lora: LoraBatch | None) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, sum of out_features], adapters included."""
        if self._is_mixed:
            parts = [_run_slice(x, part) for part in self.slices]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        elif self.weight is not None:
            y = linear(x, self.weight, self.bias)
        else:
            y = nf4_linear(x, self.weights, self.biases)
        return y if lora is None else lora.linear(self.paths, x, y)


def _run_slice(x: torch.Tensor, part: LinearSlice) -> torch.Tensor:
    if isinstance(part.weight, QuantizedWeight):
        return nf4_linear(x, [part.weight], [part.bias])
    if isinstance(part.weight, Int8Weight):
        return int8_linear(x, part.weight, part.bias)
    assert part.weight is not None
    return linear(x, part.weight, part.bias)


class DecoderLayer:
    """Attention and MLP with their norms and residuals."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        shapes = spec.layer_linear_shapes()

        def fused(*names: str) -> FusedLinear:
            return FusedLinear(
                [LinearSlice(f"model.layers.{index}.{name}", *shapes[name]) for name in names]
            )

        self.qkv_proj = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o_proj = fused("self_attn.o_proj")
        self.gate_up_proj = fused("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = fused("mlp.down_proj")
        self.input_layernorm = torch.empty(0)  # [hidden_size], as the norm below
        self.post_attention_layernorm = torch.empty(0)
        self.q_norm: torch.Tensor | None = None  # [head_dim], as k_norm
        self.k_norm: torch.Tensor | None = None
        self._eps = spec.rms_norm_eps
        self._head_dim = spec.head_dim
        self._q_size = spec.num_heads * spec.head_dim
        self._kv_size = spec.num_kv_heads * spec.head_dim
        self._scale = spec.head_dim**-0.5
        self._sliding_window = spec.sliding_windows[index]

    def __call__(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        kv_cache: tuple[torch.Tensor, ...],
        lora: LoraBatch | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer: hidden and residual in and out, [num_tokens, hidden_size] each.

        Their sum is the layer's output; it is left to the next norm, which reads it anyway. The
        first layer gets no residual.
        """
        if residual is None:
            residual, x = hidden, rms_norm(hidden, self.input_layernorm, self._eps)
        else:
            x, residual = add_rms_norm(hidden, residual, self.input_layernorm, self._eps)
        qkv = self.qkv_proj(x, lora)  # [num_tokens, q_size + 2 kv_size]
        q, k, v = qkv.split_with_sizes((self._q_size, self._kv_size, self._kv_size), -1)
        num_tokens = qkv.shape[0]
        q = q.view(num_tokens, -1, self._head_dim)  # [num_tokens, num_heads, head_dim]
        k = k.view(num_tokens, -1, self._head_dim)  # [num_tokens, num_kv_heads, head_dim]
        v = v.view(num_tokens, -1, self._head_dim)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm, self.k_norm
        k_cache, v_cache, *scales = kv_cache
        kv_scales = (scales[0], scales[1]) if scales else None
        q = rotate_and_cache(
            q, k, v, cos, sin, k_cache, v_cache, batch.slot_mapping,
            norms=norms, eps=self._eps, kv_scales=kv_scales,
        )  # fmt: skip
        attended = paged_attention(
            q, k_cache, v_cache, batch.block_tables, batch.context_lens, batch.cu_seqlens_q,
            scale=self._scale, sliding_window=self._sliding_window, kv_scales=kv_scales,
        )  # fmt: skip
        x = self.o_proj(attended.view(num_tokens, self._q_size), lora)
        x, residual = add_rms_norm(x, residual, self.post_attention_layernorm, self._eps)
        x = silu_and_mul(self.gate_up_proj(x, lora))
        return self.down_proj(x, lora), residual

    @property
    def projections(self) -> tuple[FusedLinear, ...]:
        return (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)
