"""Norms of queries and keys, rotary embedding and the cache's write in one launch.

A program takes a few heads of one token. Each step is rounded to the model's dtype where the
references round; an 8-bit cache gets the references' codes and scales to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8_cache import FP8
from kernels.gpu import device as gpu
from kernels.gpu.fp8 import scale_of, to_e4m3
from kernels.gpu.lora import TRITON_DTYPES
from kernels.paged_attention import KVScales

HEADS = 4
"""Of a program."""
MAX_HEAD_DIM = 512


@triton.jit
def _normalised(
    first, second, weight, half, there, eps, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Both halves of heads over their root mean square, times weight: float32 [HEADS, HALF]."""
    mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
    factor = tl.rsqrt(mean_square + eps)[:, None]
    w0 = tl.load(weight + half, mask=there, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(weight + HEAD_DIM // 2 + half, mask=there, other=0.0).to(tl.float32)[None, :]
    first = (first * factor).to(DTYPE).to(tl.float32) * w0
    second = (second * factor).to(DTYPE).to(tl.float32) * w1
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def _rotated(first, second, cos, sin, DTYPE: tl.constexpr):
    """Both halves, rotated: every product is rounded before the sum is, as PyTorch does."""
    a = (first * cos).to(DTYPE).to(tl.float32) - (second * sin).to(DTYPE).to(tl.float32)
    b = (second * cos).to(DTYPE).to(tl.float32) + (first * sin).to(DTYPE).to(tl.float32)
    return a.to(DTYPE).to(tl.float32), b.to(DTYPE).to(tl.float32)


@triton.jit
def _stored(
    cache, scales, first, second, slot, head, half, there, num_kv_heads,
    HEAD_DIM: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Write heads into a slot of the cache."""
    place = slot * num_kv_heads + head
    to = cache + place[:, None] * HEAD_DIM + half[None, :]
    if IS_FP8:
        bits = tl.maximum(
            tl.max(first.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1),
            tl.max(second.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1),
        )
        scale = scale_of(bits)
        tl.store(scales + place, scale.to(tl.uint8), mask=head < num_kv_heads)
        tl.store(to, to_e4m3(first, scale[:, None]), mask=there)
        tl.store(to + HEAD_DIM // 2, to_e4m3(second, scale[:, None]), mask=there)
    else:
        DTYPE: tl.constexpr = cache.dtype.element_ty
        tl.store(to, first.to(DTYPE), mask=there)
        tl.store(to + HEAD_DIM // 2, second.to(DTYPE), mask=there)


@triton.jit
def rotary_kernel(
    out, q, k, v, cos, sin, q_norm, k_norm, k_cache, v_cache, k_scales, v_scales, slot_mapping,
    num_heads, num_kv_heads, q_stride, k_stride, v_stride, eps,
    HAS_NORM: tl.constexpr, IS_FP8: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Grid (num_tokens, programs for q, then for k, then for v)."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    for_q = tl.cdiv(num_heads, HEADS)
    for_k = tl.cdiv(num_kv_heads, HEADS)
    half = tl.arange(0, HALF)
    is_there = half < HEAD_DIM // 2
    cosine = tl.load(cos + token * (HEAD_DIM // 2) + half, mask=is_there, other=0.0)
    sine = tl.load(sin + token * (HEAD_DIM // 2) + half, mask=is_there, other=0.0)
    cosine = cosine.to(DTYPE).to(tl.float32)[None, :]
    sine = sine.to(DTYPE).to(tl.float32)[None, :]
    if part < for_q:
        head = part * HEADS + tl.arange(0, HEADS)
        there = (head < num_heads)[:, None] & is_there[None, :]
        at = q + token * q_stride + head[:, None] * HEAD_DIM + half[None, :]
        first = tl.load(at, mask=there, other=0.0).to(tl.float32)
        second = tl.load(at + HEAD_DIM // 2, mask=there, other=0.0).to(tl.float32)
        if HAS_NORM:
            first, second = _normalised(first, second, q_norm, half, is_there, eps, HEAD_DIM, DTYPE)
        first, second = _rotated(first, second, cosine, sine, DTYPE)
        to = out + (token * num_heads + head[:, None]) * HEAD_DIM + half[None, :]
        tl.store(to, first.to(DTYPE), mask=there)
        tl.store(to + HEAD_DIM // 2, second.to(DTYPE), mask=there)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            is_key = part < for_q + for_k
            head = (part - for_q - tl.where(is_key, 0, for_k)) * HEADS + tl.arange(0, HEADS)
            there = (head < num_kv_heads)[:, None] & is_there[None, :]
            if is_key:
                at = k + token * k_stride + head[:, None] * HEAD_DIM + half[None, :]
                first = tl.load(at, mask=there, other=0.0).to(tl.float32)
                second = tl.load(at + HEAD_DIM // 2, mask=there, other=0.0).to(tl.float32)
                if HAS_NORM:
                    first, second = _normalised(
                        first, second, k_norm, half, is_there, eps, HEAD_DIM, DTYPE
                    )
                first, second = _rotated(first, second, cosine, sine, DTYPE)
                _stored(
                    k_cache, k_scales, first, second, slot, head, half, there, num_kv_heads,
                    HEAD_DIM, IS_FP8,
                )  # fmt: skip
            else:
                at = v + token * v_stride + head[:, None] * HEAD_DIM + half[None, :]
                first = tl.load(at, mask=there, other=0.0).to(tl.float32)
                second = tl.load(at + HEAD_DIM // 2, mask=there, other=0.0).to(tl.float32)
                _stored(
                    v_cache, v_scales, first, second, slot, head, half, there, num_kv_heads,
                    HEAD_DIM, IS_FP8,
                )  # fmt: skip


def accepts(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, norms: tuple[Tensor, Tensor] | None,
    eps: float,  # noqa: ARG001
    kv_scales: KVScales | None,
) -> bool:  # fmt: skip
    """Whether the kernel can take these arguments of rotate_and_cache."""
    whole = (cos, sin, k_cache, v_cache, slot_mapping, *(norms or ()), *(kv_scales or ()))
    kinds = {k_cache.dtype, v_cache.dtype}
    return (
        gpu.runs_here(q, k, v, *whole)
        and q.dtype in TRITON_DTYPES
        and (kinds == {FP8} if kv_scales else len(kinds) == 1 and kinds <= TRITON_DTYPES.keys())
        and cos.dtype == sin.dtype == torch.float32
        and slot_mapping.dtype == torch.int64
        and q.shape[2] <= MAX_HEAD_DIM
        and all(x.stride(2) == 1 and x.stride(1) == x.shape[2] for x in (q, k, v))
        and all(tensor.is_contiguous() for tensor in whole)
    )


def run(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    kv_scales: KVScales | None,
) -> Tensor:  # fmt: skip
    """rotate_and_cache for arguments that were accepted."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    if kv_scales is not None:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    q_norm, k_norm = norms or (q, q)
    k_scales, v_scales = kv_scales or (q, q)
    parts = triton.cdiv(num_heads, HEADS) + 2 * triton.cdiv(num_kv_heads, HEADS)
    rotary_kernel[(num_tokens, parts)](
        out, q, k, v, cos, sin, q_norm, k_norm, k_cache, v_cache, k_scales, v_scales, slot_mapping,
        num_heads, num_kv_heads, q.stride(0), k.stride(0), v.stride(0), eps,
        HAS_NORM=norms is not None, IS_FP8=kv_scales is not None, HEADS=HEADS, HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out
