"""One decoder layer in two halves, with gradients: the serving layer's own tensors.

Each half takes and gives the residual stream, [num_tokens, hidden_size].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model import CausalLM
from engine.train.batch import TokenBatch
from engine.train.packed_attention import PackedLayout, pack, packed_attention
from engine.train.pointwise import apply_rotary, rms_norm, silu_and_mul
from engine.train.projection import project
from engine.train.short_attention import MAX_LENGTH
from engine.train.updates import Updates


@dataclass(frozen=True, slots=True, eq=False)
class TokenContext:
    """What every layer needs to know of a micro-batch's tokens."""

    cos: Tensor
    """float32 [num_tokens, head_dim / 2]."""
    sin: Tensor
    layout: PackedLayout


def token_context(model: CausalLM, batch: TokenBatch) -> TokenContext:
    """Angles and layout of a micro-batch."""
    angles = batch.positions.unsqueeze(-1) * model.inv_freq
    layout = pack(batch.lengths, batch.input_ids.device)
    return TokenContext(angles.cos(), angles.sin(), layout)


def attention_half(
    model: CausalLM, index: int, x: Tensor, context: TokenContext, updates: Updates
) -> Tensor:
    """The stream after attention."""
    layer, spec = model.layers[index], model.spec
    normed = rms_norm(x, layer.input_layernorm, spec.rms_norm_eps)
    qkv = project(normed, layer.qkv_proj, updates)
    sizes = [heads * spec.head_dim for heads in (spec.num_heads, *(spec.num_kv_heads,) * 2)]
    q, k, v = (
        part.view(len(x), -1, spec.head_dim) for part in torch.split(qkv, sizes, dim=1)
    )  # [num_tokens, num_heads or num_kv_heads, head_dim]
    if layer.q_norm is not None and layer.k_norm is not None:
        q = rms_norm(q, layer.q_norm, spec.rms_norm_eps)
        k = rms_norm(k, layer.k_norm, spec.rms_norm_eps)
    q, k = apply_rotary(q, k, context.cos, context.sin)
    attended = packed_attention(q, k, v, context.layout, spec.sliding_windows[index])
    return x + project(attended.flatten(1), layer.o_proj, updates)


def mlp_half(model: CausalLM, index: int, x: Tensor, updates: Updates) -> Tensor:
    """The stream after the MLP."""
    layer = model.layers[index]
    normed = rms_norm(x, layer.post_attention_layernorm, model.spec.rms_norm_eps)
    activations = silu_and_mul(project(normed, layer.gate_up_proj, updates))
    return x + project(activations, layer.down_proj, updates)


def activation_bytes(model: CausalLM, batch: TokenBatch, updates: Updates) -> int:
    """About what one layer's graph takes, both halves."""
    spec = model.spec
    q_size = spec.num_heads * spec.head_dim
    inputs = 2 * spec.hidden_size + q_size + spec.intermediate_size  # of the four projections
    per_token = inputs + 4 * spec.hidden_size + 5 * q_size + 2 * spec.intermediate_size
    if updates.dropout:
        per_token += inputs  # the masks
    numel = batch.num_tokens * per_token
    if batch.input_ids.device.type == "cpu":  # short_attention's probabilities
        squares = sum(length**2 for length in batch.lengths if length <= MAX_LENGTH)
        numel += spec.num_heads * squares
    return numel * model.dtype.itemsize
