"""What the device offers, and how kernels are set up for it: the one table to fill by measuring.

Every figure in PLANS is an estimate from counting instructions and bytes (docs/performance.md);
none was measured yet. bench/gpu_linear.py measures what they should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How the decode kernel runs on one architecture."""

    rows: int = 128
    """Weight rows per tile."""
    num_warps: int = 4
    num_stages: int = 4
    """For up to 8 tokens; one less above. Chosen so that dynamic shared memory passes 48 KB:
    between 14 KB and that, the launch fails (docs/performance.md)."""
    programs_per_sm: int = 2
    max_tokens: int = 64
    """Above, the weight is dequantised and multiplied by the vendor's library."""
    max_tokens_small: int = 64
    """The same for weights of fewer than SMALL_WEIGHT elements."""


SMALL_WEIGHT = 1 << 25

PLANS: dict[Capability, DecodePlan] = {
    (8, 0): DecodePlan(programs_per_sm=1),
    (8, 6): DecodePlan(programs_per_sm=1),
    (8, 7): DecodePlan(programs_per_sm=1),
    (8, 9): DecodePlan(programs_per_sm=1),
    (9, 0): DecodePlan(),
    (10, 0): DecodePlan(),
    (10, 3): DecodePlan(),
    (12, 0): DecodePlan(programs_per_sm=1),
    (12, 1): DecodePlan(programs_per_sm=1),
}
"""By compute capability; what is not here runs the portable kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How attention runs on one architecture: splits of few new tokens, chunks of many."""

    split_keys: int = 64
    """Keys at a time; KV_SPLIT is a multiple of it."""
    split_warps: int = 4
    split_stages: int = 3
    programs_per_sm: int = 4
    """Of splits: as many programs are launched as this and the number of splits allow."""
    chunk_rows: int = 128
    """Tokens times query heads to a kv head; half as many where heads are wider than 128."""
    chunk_keys: int = 32
    chunk_keys_fp8: int = 32
    """In an 8-bit cache, where conversions take registers."""
    chunk_warps: int = 8
    chunk_stages: int = 3


ATTENTION_PLANS: dict[Capability, AttentionPlan] = {
    (7, 5): AttentionPlan(
        split_keys=32, chunk_rows=16, chunk_keys=16, chunk_keys_fp8=16, chunk_warps=4
    ),
    (8, 0): AttentionPlan(),
    (8, 6): AttentionPlan(),
    (8, 7): AttentionPlan(),
    (8, 9): AttentionPlan(),
    (9, 0): AttentionPlan(chunk_keys=64),
    (10, 0): AttentionPlan(chunk_keys=64),
    (10, 3): AttentionPlan(chunk_keys=64),
    (12, 0): AttentionPlan(),
    (12, 1): AttentionPlan(),
}
"""By compute capability; elsewhere the reference runs."""

MAX_PORTABLE_TOKENS = 4
"""The portable kernel reads the weight once per token."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def runs_here(*tensors: Tensor | None) -> bool:
    """Whether Triton can work on all of these tensors, and they are on one device."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        return False
    kind = devices.pop().type
    return kind == "cuda" or (kind == "cpu" and interpreting())


@cache
def capability(device: torch.device) -> Capability:
    """Compute capability; (0, 0) where there is none, as under ROCm and the interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter three, for an uneven share of work."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_plan(device: torch.device) -> DecodePlan | None:
    """The decode kernel's plan on a device; None: it does not run there."""
    if interpreting():
        return DecodePlan(rows=32, programs_per_sm=1)
    return PLANS.get(capability(device))


def attention_plan(device: torch.device) -> AttentionPlan | None:
    """Attention's plan on a device; None: it does not run there."""
    if interpreting():
        return AttentionPlan(chunk_rows=32, chunk_keys=64)
    return ATTENTION_PLANS.get(capability(device))


def max_decode_tokens(plan: DecodePlan, numel: int) -> int:
    """Most tokens that the decode kernel takes for a weight of so many elements."""
    return plan.max_tokens_small if numel < SMALL_WEIGHT else plan.max_tokens


_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_zeros: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []
"""Counters that were too few: captured graphs may still use them."""


def scratch(device: torch.device, dtype: torch.dtype, numel: int) -> Tensor:
    """A buffer of so many elements, the same one in every call that it suffices for.

    Used within one operation on the current stream; whoever calls next overwrites it. A graph that
    is being captured gets one of its own, because a buffer that grows leaves its old place.
    """
    if _is_capturing(device):
        return torch.empty(numel, dtype=dtype, device=device)
    buffer = _scratch.get((device, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = _scratch[device, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


def counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros [count or more], one buffer per stream: whoever launches there takes turns.

    Kernels leave them zero, so that a graph needs no launch to clear them: it uses those of the
    stream on which it is captured, where what it calls has run there before; else some of its own.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = _zeros.get((device, stream))
    if buffer is not None and buffer.numel() >= count:
        return buffer
    if _is_capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    if buffer is not None:
        _outgrown.append(buffer)
    size = max(count, 1 << 14)
    buffer = _zeros[device, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    return buffer


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
