"""Host side of paged attention on the GPU: what it takes, its plans, and its launches.

A sequence with few new tokens (a decode, or one that checks guesses) is read in splits of KV_SPLIT
keys, which are then joined; a prompt chunk runs tile by tile. Which of the two is decided by the
sequence's own number of new tokens, and a split's bounds by its positions: a token's bits do not
depend on the other sequences of the batch, nor on the number of programs, which is chosen from
that of processors. HERD_KERNELS=invariant runs every token as a decode: then they do not depend on
its chunk either. Nothing on the device is waited for, and grids depend on shapes only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import batch_invariant
from kernels.fp8_cache import FP8
from kernels.gpu import device as gpu
from kernels.gpu.attention_kernel import chunk_kernel, join_kernel, split_kernel
from kernels.gpu.fp8 import BIAS
from kernels.gpu.lora import TRITON_DTYPES
from kernels.paged_attention import (
    KV_SPLIT,
    MAX_SPLIT_QUERIES,
    KVScales,
    split_workspace_bytes,
)

MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Query heads to a kv head."""
SPLITS_AT_ONCE = 16
"""Splits in one step of joining."""


def accepts(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,  # noqa: ARG001
    sliding_window: int | None,  # noqa: ARG001
    kv_scales: KVScales | None = None,
) -> bool:
    """Whether the kernels can take these arguments of paged_attention."""
    tensors = (q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, *(kv_scales or ()))
    head_dim = q.shape[2]
    kinds = {k_cache.dtype, v_cache.dtype}
    return (
        gpu.runs_here(*tensors)
        and gpu.attention_plan(q.device) is not None
        and q.dtype in TRITON_DTYPES
        and (kinds == {FP8} if kv_scales else len(kinds) == 1 and kinds <= TRITON_DTYPES.keys())
        and q.stride(2) == 1
        and q.stride(1) == head_dim <= MAX_HEAD_DIM
        and head_dim % 2 == 0
        and q.shape[1] // k_cache.shape[2] <= MAX_GROUP
        and k_cache.shape[1] & (k_cache.shape[1] - 1) == 0
        and all(tensor.is_contiguous() for tensor in tensors[1:])
    )


def run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """paged_attention for arguments that were accepted."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_seqs = len(q), len(context_lens)
    if num_tokens == 0:
        return out
    if batch_invariant() and num_tokens > num_seqs:
        block_tables, context_lens, cu_seqlens_q = _every_token_alone(
            num_tokens, block_tables, context_lens, cu_seqlens_q
        )
        num_seqs = num_tokens
    # Each sequence has a new token: no other can have more than the rest.
    most_new = num_tokens - num_seqs + 1
    common = _Launch(
        q, out, k_cache, v_cache, kv_scales, block_tables, context_lens, cu_seqlens_q, scale,
        sliding_window,
    )  # fmt: skip
    if num_seqs > 1 or most_new <= MAX_SPLIT_QUERIES:
        common.run_splits(min(MAX_SPLIT_QUERIES, most_new))
    if most_new > MAX_SPLIT_QUERIES:
        common.run_chunks()
    return out


def _every_token_alone(
    num_tokens: int, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Block tables, context lengths and bounds that make each token a sequence of its own."""
    token = torch.arange(num_tokens + 1, dtype=torch.int32, device=context_lens.device)
    seq = torch.searchsorted(cu_seqlens_q, token[:-1], right=True) - 1
    lens = context_lens[seq] - cu_seqlens_q[seq + 1] + token[1:]
    return block_tables[seq], lens.clamp_(min=0), token


class _Launch:
    """The arguments that the kernels share."""

    def __init__(
        self, q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scales: KVScales | None,
        block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor, scale: float,
        sliding_window: int | None,
    ) -> None:  # fmt: skip
        plan = gpu.attention_plan(q.device)
        assert plan is not None
        self.plan, self.q, self.out = plan, q, out
        self.context_lens, self.cu_seqlens_q = context_lens, cu_seqlens_q
        self.num_kv_heads, self.head_dim = k_cache.shape[2:]
        self.group = q.shape[1] // self.num_kv_heads
        self.half = max(16, triton.next_power_of_2(self.head_dim // 2))
        self.window = sliding_window or 0
        self.table_width = block_tables.shape[1]
        self.max_splits = -(-self.table_width * k_cache.shape[1] // KV_SPLIT)
        is_fp8 = k_cache.dtype == FP8
        products, precision = _product(q, k_cache)
        if is_fp8:
            k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
            scale *= 2.0**BIAS
        k_scales, v_scales = kv_scales or (q, q)
        self.caches = k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, cu_seqlens_q
        self.scale = scale * math.log2(math.e)
        self.options: dict[str, Any] = {
            "QUERIES": MAX_SPLIT_QUERIES, "WINDOWED": sliding_window is not None,
            "HEAD_DIM": self.head_dim, "HALF": self.half, "FP8": is_fp8,
        }  # fmt: skip
        self.products: dict[str, Any] = {
            "BLOCK_SIZE": k_cache.shape[1], "DTYPE": products, "PRECISION": precision,
            "ASM": not gpu.interpreting() and gpu.capability(q.device) > (0, 0),
        }  # fmt: skip

    def run_splits(self, room: int) -> None:
        """Sequences of few new tokens, at most `room` here."""
        rows = max(16, triton.next_power_of_2(self.group))
        tiles = triton.cdiv(room, rows // self.group)
        device, plan, heads = self.q.device, self.plan, self.num_kv_heads
        num_seqs = len(self.context_lens)
        per_seq = heads * self.max_splits * room * self.group
        num_bytes = split_workspace_bytes(
            num_seqs, room, num_heads=heads * self.group, head_dim=self.head_dim,
            max_len=self.max_splits * KV_SPLIT,
        )  # fmt: skip
        at_once = num_bytes // (4 * per_seq * (2 * self.half + 2))
        partial = torch.empty(at_once * per_seq, 2 * self.half, dtype=torch.float32, device=device)
        stats = torch.empty(at_once * per_seq, 2, dtype=torch.float32, device=device)
        wanted = plan.programs_per_sm * gpu.num_processors(device)
        for first in range(0, num_seqs, at_once):
            seqs = min(at_once, num_seqs - first)
            programs = min(self.max_splits, -(-wanted // (heads * seqs * tiles)))
            split_kernel[(programs, heads, seqs * tiles)](
                partial, stats, self.q, *self.caches, first, self.table_width, heads, self.group,
                tiles, self.max_splits, self.window, self.scale, self.q.stride(0), **self.options,
                **self.products, ROOM=room, SPLIT=KV_SPLIT, ROWS=rows, KEYS=plan.split_keys,
                num_warps=plan.split_warps, num_stages=plan.split_stages,
            )  # fmt: skip
            join_kernel[(room * self.group, heads, seqs)](
                self.out, partial, stats, self.context_lens, self.cu_seqlens_q, first, heads,
                self.group, self.max_splits, self.window, self.out.stride(0), **self.options,
                ROOM=room, SPLIT=KV_SPLIT, AT_ONCE=SPLITS_AT_ONCE, num_warps=1,
            )  # fmt: skip

    def run_chunks(self) -> None:
        """Sequences of more new tokens."""
        plan, num_seqs = self.plan, len(self.context_lens)
        rows = plan.chunk_rows if self.head_dim <= 128 else plan.chunk_rows // 2
        rows = max(16, rows, triton.next_power_of_2(self.group))
        tiles = len(self.q) // (rows // self.group) + num_seqs
        chunk_kernel[(tiles, self.num_kv_heads)](
            self.out, self.q, *self.caches, num_seqs, self.table_width, self.num_kv_heads,
            self.group, self.window, self.scale, self.q.stride(0), self.out.stride(0),
            **self.options, **self.products, ROWS=rows,
            KEYS=plan.chunk_keys_fp8 if self.options["FP8"] else plan.chunk_keys,
            num_warps=plan.chunk_warps, num_stages=plan.chunk_stages,
        )  # fmt: skip


def _product(q: Tensor, cache: Tensor) -> tuple[Any, str]:
    """Dtype and precision of the products: the wider of q's and the cache's.

    8-bit codes are exact in float16, both 16-bit types in TF32.
    """
    if gpu.interpreting():  # its bfloat16 is wrong
        return tl.float32, "ieee"
    if cache.dtype == FP8:
        return tl.float16, "ieee"
    if q.dtype == cache.dtype:
        return TRITON_DTYPES[q.dtype], "ieee"
    return tl.float32, "ieee" if torch.float32 in (q.dtype, cache.dtype) else "tf32"
