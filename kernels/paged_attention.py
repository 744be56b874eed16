"""Causal attention over a paged KV cache, prompt chunks and single tokens in one flat batch.

Numerics: scores, softmax and sums in float32, rounded once to q's dtype. Keys are visited in fixed splits of KV_SPLIT
positions with a running softmax, each query token for itself, so that a row's arithmetic depends on its own keys only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch

KV_SPLIT = 256
"""Key positions handled at a time; counted from position 0 of the sequence, whatever the blocks."""
MASKED = -1e30
"""Running maximum of a row that has seen no key: finite, so that no infinities are subtracted from each other."""


def write_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store this step's keys and values in their slots, rounded to the cache's dtype.

    Args:
        k, v:             [num_tokens, num_kv_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping:     int64 [num_tokens], block_id * block_size + offset; -1 = do not store.

    Raises:
        ValueError: shapes disagree.
    """
    check(k.shape == v.shape, "v.shape", tuple(k.shape), tuple(v.shape))
    check(k_cache.dim() == 4 and k.shape[1:] == k_cache.shape[2:], "k_cache.shape", ("num_blocks", "block_size", *k.shape[1:]), tuple(k_cache.shape))
    check(v_cache.shape == k_cache.shape, "v_cache.shape", tuple(k_cache.shape), tuple(v_cache.shape))
    check(slot_mapping.shape == (len(k),), "slot_mapping.shape", (len(k),), tuple(slot_mapping.shape))
    dispatch("write_kv_cache", write_kv_cache_reference, k, v, k_cache, v_cache, slot_mapping)


def write_kv_cache_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """write_kv_cache in plain PyTorch."""
    stored = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[stored]
    k_cache.flatten(0, 1)[slots] = k[stored].to(k_cache.dtype)
    v_cache.flatten(0, 1)[slots] = v[stored].to(v_cache.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend each new token to the keys of its sequence up to its own position.

    Query i of a sequence with n new tokens and context length c sits at position c - n + i; it sees key j iff j is not
    after it and, with a sliding window, position - j < sliding_window.

    Args:
        q:                [num_tokens, num_heads, head_dim], sequences one after another.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        block_tables:     int32 [num_seqs, max_num_blocks], padded with -1.
        context_lens:     int32 [num_seqs], this step's tokens included.
        cu_seqlens_q:     int32 [num_seqs + 1], prefix sums of new tokens.
        scale:            multiplies the scores, usually head_dim ** -0.5.

    Returns:
        q's shape and dtype.

    Raises:
        ValueError: shapes disagree, or the window is not positive.
    """
    num_seqs = len(context_lens)
    check(q.dim() == 3 and q.shape[2] == k_cache.shape[-1], "q.shape", ("num_tokens", "num_heads", k_cache.shape[-1]), tuple(q.shape))
    check(k_cache.dim() == 4 and q.shape[1] % k_cache.shape[2] == 0, "k_cache.shape", f"num_kv_heads that divides {q.shape[1]}", tuple(k_cache.shape))
    check(v_cache.shape == k_cache.shape, "v_cache.shape", tuple(k_cache.shape), tuple(v_cache.shape))
    check(len(block_tables) == num_seqs, "block_tables.shape[0]", num_seqs, len(block_tables))
    check(len(cu_seqlens_q) == num_seqs + 1, "cu_seqlens_q.shape[0]", num_seqs + 1, len(cu_seqlens_q))
    check(sliding_window is None or sliding_window > 0, "sliding_window", "a positive number or None", sliding_window)
    return dispatch("paged_attention", paged_attention_reference, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, sliding_window)


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    scale: float, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """paged_attention in plain PyTorch."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    num_new = cu_seqlens_q.diff()  # [num_seqs]
    seq_of_token = torch.repeat_interleave(num_new)  # [num_tokens]
    positions = torch.arange(num_tokens, device=q.device) + (context_lens - cu_seqlens_q[1:])[seq_of_token]
    tables = block_tables.clamp(min=0)

    q32 = q.view(num_tokens, num_kv_heads, group, head_dim).float() * scale
    acc = torch.zeros_like(q32)
    running_max = q32.new_full((num_tokens, num_kv_heads, group, 1), MASKED)
    running_sum = torch.zeros_like(running_max)
    for start in range(0, int(context_lens.max()), KV_SPLIT):
        key_positions = torch.arange(start, start + KV_SPLIT, device=q.device)
        blocks = tables[:, (key_positions // block_size).clamp(max=tables.shape[1] - 1)]  # [num_seqs, KV_SPLIT]
        slots = (blocks * block_size + key_positions % block_size)[seq_of_token]  # [num_tokens, KV_SPLIT]
        keys = k_cache.flatten(0, 1)[slots].float().permute(0, 2, 3, 1)  # [num_tokens, num_kv_heads, head_dim, KV_SPLIT]
        values = v_cache.flatten(0, 1)[slots].float().transpose(1, 2)  # [num_tokens, num_kv_heads, KV_SPLIT, head_dim]
        distance = positions[:, None] - key_positions  # [num_tokens, KV_SPLIT]
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        scores = (q32 @ keys).masked_fill_(~visible[:, None, None], float("-inf"))
        values = values.masked_fill(~visible[:, None, :, None], 0.0)
        new_max = torch.maximum(running_max, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp(scores - new_max)
        shrink = torch.exp(running_max - new_max)
        running_sum = running_sum * shrink + weights.sum(dim=-1, keepdim=True)
        acc = acc * shrink + weights @ values
        running_max = new_max
    return (acc / running_sum).to(q.dtype).view(num_tokens, num_heads, head_dim)
