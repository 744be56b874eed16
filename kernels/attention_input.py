"""From a projection's queries, keys and values to what attention reads, as one operation.

Its definition is the steps themselves, each an operation of its own with its own implementations;
on a GPU they are one launch.
"""

from __future__ import annotations

from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.fused import apply_rotary, rms_norm
from kernels.paged_attention import KVScales, write_kv_cache


def rotate_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Normalise queries and keys by head, rotate them, and store keys and values.

    Args:
        q:    [num_tokens, num_heads, head_dim].
        k, v: [num_tokens, num_kv_heads, head_dim], q's dtype.
        cos, sin: as apply_rotary's.
        k_cache, v_cache, slot_mapping, kv_scales: as write_kv_cache's.
        norms: weights [head_dim] for q and for k, or None for models without; see rms_norm.
        eps:   of the norms.

    Returns:
        The rotated q, a new tensor.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    num_tokens, _, head_dim = q.shape
    half = (num_tokens, head_dim // 2)
    check(head_dim % 2 == 0, "head_dim", "an even number", head_dim)
    shape = (num_tokens, k_cache.shape[2], head_dim)
    check(k.shape == shape, "k.shape", shape, tuple(k.shape))
    check(v.shape == shape, "v.shape", shape, tuple(v.shape))
    check(k_cache.shape[3] == head_dim, "k_cache.shape[3]", head_dim, k_cache.shape[3])
    check(k.dtype == v.dtype == q.dtype, "k.dtype, v.dtype", q.dtype, (k.dtype, v.dtype))
    check(cos.shape == half, "cos.shape", half, tuple(cos.shape))
    check(sin.shape == half, "sin.shape", half, tuple(sin.shape))
    slots = tuple(slot_mapping.shape)
    check(slots == (num_tokens,), "slot_mapping.shape", (num_tokens,), slots)
    return dispatch(
        "rotate_and_cache", rotate_and_cache_in_steps,
        q, k, v, cos, sin, k_cache, v_cache, slot_mapping, norms, eps, kv_scales,
    )  # fmt: skip


def rotate_and_cache_in_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    kv_scales: KVScales | None,
) -> Tensor:
    """rotate_and_cache, one operation after another."""
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    q, k = apply_rotary(q, k, cos, sin)
    write_kv_cache(k, v, k_cache, v_cache, slot_mapping, kv_scales)
    return q
