"""How large the KV cache is, decided once at start, and its allocation.

By flag, or what is free: on CUDA gpu_memory_utilization of the device less weights, activations
and what is kept for later (engine/memory_plan.py), on the CPU half of the free memory and at most
CPU_LIMIT_BYTES; in both cases no more than max_num_seqs full sequences need.
"""

from __future__ import annotations

import torch

from engine.config import CacheConfig
from engine.errors import NotEnoughMemory
from engine.memory import available_host_bytes, format_bytes
from engine.model_config import DTYPES, ModelSpec
from kernels.fp8_cache import FP8

CPU_LIMIT_BYTES = 4 * 2**30
"""Default upper limit on the CPU: a server must not take a shared machine's memory unasked."""
CPU_SHARE = 0.5
"""Default share of the free memory on the CPU."""

KVCaches = list[tuple[torch.Tensor, ...]]
"""Of each layer k_cache and v_cache, and where these are 8-bit, the scales of both."""


def kv_cache_dtype(config: CacheConfig, model_dtype: torch.dtype) -> torch.dtype:
    """The type of cached keys and values."""
    if config.kv_cache_dtype == "auto":
        return model_dtype
    return FP8 if config.kv_cache_dtype == "fp8" else DTYPES[config.kv_cache_dtype]


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values, scales included."""
    head_bytes = spec.head_dim * dtype.itemsize + (dtype == FP8)
    return 2 * spec.num_layers * block_size * spec.num_kv_heads * head_bytes


def choose_num_blocks(
    config: CacheConfig,
    *,
    bytes_per_block: int,
    max_model_len: int,
    max_num_seqs: int,
    free_bytes: int,
    free_means: str,
) -> int:
    """Blocks to allocate.

    Args:
        config: kv_cache_memory_bytes, where it is set, replaces free_bytes.
        bytes_per_block: from block_bytes.
        max_model_len: longest prompt plus output, in tokens.
        max_num_seqs: sequences in one step at most.
        free_bytes: what may be taken by default.
        free_means: for the error message, where free_bytes comes from.

    Raises:
        NotEnoughMemory: not even one sequence of max_model_len fits.
    """
    blocks_per_seq = -(-max_model_len // config.block_size)
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
        found, remedy = "--kv-cache-memory-bytes", "Raise --kv-cache-memory-bytes"
    else:
        num_blocks = min(free_bytes // bytes_per_block, blocks_per_seq * max_num_seqs)
        found, remedy = free_means, "Set --kv-cache-memory-bytes if more may be used"
        if "gpu" in free_means:
            remedy = "Raise --gpu-memory-utilization"
    if num_blocks < blocks_per_seq:
        available = config.kv_cache_memory_bytes or max(0, free_bytes)
        longest = max(0, num_blocks) * config.block_size
        raise NotEnoughMemory(
            f"The KV cache of one sequence of {max_model_len} tokens needs "
            f"{format_bytes(blocks_per_seq * bytes_per_block)}, but there are "
            f"{format_bytes(available)} ({found}), room for {longest} tokens. {remedy}, lower "
            f"--max-model-len, or choose a smaller --kv-cache-dtype."
        )
    return num_blocks


def allocate_kv_caches(
    spec: ModelSpec,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCaches:
    """One (k_cache, v_cache) per layer, each [num_blocks, block_size, num_kv_heads, head_dim].

    8-bit caches come with their scales, uint8 [num_blocks, block_size, num_kv_heads] each.

    Raises:
        NotEnoughMemory: the allocator refuses.
    """
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    parts: list[tuple[tuple[int, ...], torch.dtype]] = [(shape, dtype)] * 2
    if dtype == FP8:
        parts += [(shape[:3], torch.uint8)] * 2
    try:
        return [
            tuple(torch.empty(size, dtype=kind, device=device) for size, kind in parts)
            for _ in range(spec.num_layers)
        ]
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain RuntimeError on the CPU
        total = num_blocks * block_bytes(spec, block_size, dtype)
        raise NotEnoughMemory(
            f"The KV cache of {format_bytes(total)} could not be allocated on {device}: {error} "
            f"Lower --kv-cache-memory-bytes or --max-model-len."
        ) from error


def default_cpu_bytes() -> int:
    """What the KV cache takes on the CPU when no flag says otherwise."""
    available_bytes = available_host_bytes()
    if available_bytes is None:
        return CPU_LIMIT_BYTES
    return min(CPU_LIMIT_BYTES, int(available_bytes * CPU_SHARE))


def default_cuda_bytes(
    device: torch.device, gpu_memory_utilization: float, reserved_bytes: int
) -> int:
    """What is left of the allowed share of a GPU after what is on it and what is yet to come."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    used_bytes = total_bytes - free_bytes
    return int(total_bytes * gpu_memory_utilization) - used_bytes - reserved_bytes
