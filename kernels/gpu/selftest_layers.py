"""One small random case per kernel between the linear layers; see selftest.py for the form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.fp8_cache import FP8, write_fp8_cache_reference
from kernels.fused import (
    add_rms_norm_reference,
    apply_rotary_reference,
    rms_norm_reference,
    silu_and_mul_reference,
)
from kernels.gpu.selftest import Accepts, Run, compare, random
from kernels.paged_attention import paged_attention_reference, write_kv_cache_reference
from kernels.sampling import apply_bitmask_reference
from kernels.truncation import truncate_reference

BLOCK_SIZE = 16
HEAD_DIM = 64
NUM_HEADS, NUM_KV_HEADS = 4, 2


def _move(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The same with the tensors on the device, nested ones too."""
    return tuple(
        x.to(device) if isinstance(x, Tensor) else _move(x, device) if isinstance(x, tuple) else x
        for x in arguments
    )


def _run(
    run: Run, accepts: Accepts, device: torch.device, expected: Tensor, *arguments: Any
) -> str | None:
    there = _move(arguments, device)
    if not accepts(*there):
        return "not made for this device"
    result = run(*there)
    return compare(result[0] if isinstance(result, tuple) else result, expected)


def rms_norm(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """An odd size."""
    x, weight = random(3, 200, seed=1).bfloat16(), random(200, seed=2).bfloat16()
    expected = rms_norm_reference(x.float(), weight.float(), 1e-5)
    return _run(run, accepts, device, expected, x, weight, 1e-5)


def add_rms_norm(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The normalised sum."""
    x, residual = (random(3, 200, seed=seed).bfloat16() for seed in (1, 2))
    weight = random(200, seed=3).bfloat16()
    expected, _ = add_rms_norm_reference(x.float(), residual.float(), weight.float(), 1e-5)
    return _run(run, accepts, device, expected, x, residual, weight, 1e-5)


def silu_and_mul(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """An odd size."""
    x = random(3, 150, seed=1).bfloat16()
    return _run(run, accepts, device, silu_and_mul_reference(x.float()), x)


def rotary(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """With norms, into a 16-bit and an 8-bit cache; queries, and what the caches hold."""
    return _rotary(run, accepts, device, torch.bfloat16) or _rotary(run, accepts, device, FP8)


def _rotary(run: Run, accepts: Accepts, device: torch.device, kind: torch.dtype) -> str | None:
    heads = [
        random(3, num, HEAD_DIM, seed=num).bfloat16()
        for num in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    ]
    angles = random(3, HEAD_DIM // 2, seed=1)
    norms = random(HEAD_DIM, seed=2).bfloat16(), random(HEAD_DIM, seed=3).bfloat16()
    shape = (2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)

    def caches(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Any]:
        pair = [torch.zeros(shape, device=device).to(dtype) for _ in range(2)]
        if dtype != FP8:
            return pair, None
        return pair, tuple(
            torch.full(shape[:3], 127, dtype=torch.uint8, device=device) for _ in range(2)
        )

    slots = torch.tensor([17, -1, 2])
    ours, our_scales = caches(kind, device)
    there = _move((*heads, angles.cos(), angles.sin(), *ours, slots, norms, 1e-5), device)
    if not accepts(*there, our_scales):
        return "not made for this device"
    rotated = run(*there, our_scales)
    theirs, _ = caches(torch.float32, torch.device("cpu"))
    q, k = (
        rms_norm_reference(x.float(), norm.float(), 1e-5)
        for x, norm in zip(heads[:2], norms, strict=True)
    )
    q, k = apply_rotary_reference(q, k, angles.cos(), angles.sin())
    write_kv_cache_reference(k, heads[2].float(), theirs[0], theirs[1], slots)
    problem = compare(rotated, q)
    for side in range(2):
        held = ours[side].cpu().float()
        if our_scales is not None:
            held *= (our_scales[side].cpu().float() - 127).exp2()[..., None]
        if kind == FP8:  # 2**-4 of each number
            problem = problem or _differs(held, theirs[side], 0.07)
        else:
            problem = problem or compare(held, theirs[side])
    return problem


def _differs(actual: Tensor, expected: Tensor, share: float) -> str | None:
    limit = share * expected.abs().amax(dim=-1, keepdim=True)
    return None if ((actual - expected).abs() <= limit).all() else "8-bit numbers are wrong"


def attention(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """Decodes of one and two splits, padding and a chunk, in a window and without."""
    return _attention(run, accepts, device, torch.bfloat16)


def attention_fp8(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The same from an 8-bit cache."""
    return _attention(run, accepts, device, FP8)


def _attention(run: Run, accepts: Accepts, device: torch.device, kind: torch.dtype) -> str | None:
    lens, new = [40, 270, 0, 30], [1, 1, 1, 20]
    num_blocks = [-(-length // BLOCK_SIZE) for length in lens]
    shape = (sum(num_blocks), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.full((len(lens), max(num_blocks)), -1, dtype=torch.int32)
    first = 0
    for seq, count in enumerate(num_blocks):
        tables[seq, :count] = torch.arange(first, first + count).flip(0)
        first += count
    caches, scales = [torch.zeros(shape).to(kind) for _ in range(2)], None
    k, v = (random(shape[0] * BLOCK_SIZE, *shape[2:], seed=seed).bfloat16() for seed in (1, 2))
    slots = torch.arange(len(k))
    if kind == FP8:
        scales = torch.zeros(shape[:3]).byte(), torch.zeros(shape[:3]).byte()
        write_fp8_cache_reference(k, v, caches[0], caches[1], slots, scales)
    else:
        write_kv_cache_reference(k, v, caches[0], caches[1], slots)
    q = random(sum(new), NUM_HEADS, HEAD_DIM, seed=3).bfloat16()
    bounds = torch.tensor([0, *new]).cumsum(0).int()
    shared = *caches, tables, torch.tensor(lens).int(), bounds, HEAD_DIM**-0.5
    for window in (None, 35):
        last = (window,) if scales is None else (window, scales)
        expected = paged_attention_reference(q.float(), *shared, *last)
        problem = _run(run, accepts, device, expected, q, *shared, *last)
        if problem:
            return problem
    return None


def truncate(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """All rules, together and off; to the bit."""
    probs = (random(4, 1100, seed=1) * 2).softmax(dim=-1)
    min_p, top_k = torch.tensor([0.0, 0.05, 0, 0]), torch.tensor([0, 40, 7, 0])
    top_p = torch.tensor([0.9, 0.5, 1.0, 1.0])
    ours = probs.to(device)
    rules = _move((min_p, top_k, top_p), device)
    if not accepts(ours, *rules):
        return "not made for this device"
    run(ours, *rules)
    truncate_reference(probs, min_p, top_k, top_p)
    return None if torch.equal(ours.cpu(), probs) else "other tokens are dropped"


def bitmask(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """Two of three rows, words in part."""
    logits, rows = random(3, 70, seed=1), [2, 0]
    words = torch.tensor([[-559038737, 0, 21], [1, -1, 42]], dtype=torch.int32)
    ours = logits.to(device)
    if not accepts(ours, rows, words):
        return "not made for this device"
    run(ours, rows, words)
    apply_bitmask_reference(logits, rows, words)
    return None if torch.equal(ours.cpu(), logits) else "other tokens are masked"
