"""How many KV blocks are allocated, and what is said when they cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine import kv_cache
from engine.config import CacheConfig
from engine.errors import NotEnoughMemory
from engine.kv_cache import allocate_kv_caches, block_bytes, choose_num_blocks, kv_cache_dtype
from kernels.fp8_cache import FP8

SPEC = SimpleNamespace(num_layers=3, num_kv_heads=2, head_dim=8)


def choose(config: CacheConfig, free_bytes: int = 10**9, **changes) -> int:
    options = {
        "bytes_per_block": 1000,
        "max_model_len": 100,
        "max_num_seqs": 4,
        "free_bytes": free_bytes,
        "free_means": "half of the free memory",
        **changes,
    }
    return choose_num_blocks(config, **options)


def test_by_default_no_more_than_full_sequences_need():
    assert choose(CacheConfig(block_size=16)) == 4 * 7


def test_by_default_no_more_than_is_free():
    assert choose(CacheConfig(block_size=16), free_bytes=20_500) == 20


def test_the_flag_is_taken_at_its_word():
    config = CacheConfig(block_size=16, kv_cache_memory_bytes=123_456)
    assert choose(config) == 123
    assert choose(config, free_bytes=0) == 123


@pytest.mark.parametrize(
    "config, free_bytes, free_means, words",
    [
        (CacheConfig(), 6_999, "half of the free memory", "Set --kv-cache-memory-bytes"),
        (CacheConfig(), -5, "--gpu-memory-utilization 0.9", "Raise --gpu-memory-utilization"),
        (CacheConfig(kv_cache_memory_bytes=6_999), 10**9, "x", "Raise --kv-cache-memory-bytes"),
    ],
)
def test_too_little_for_one_sequence_names_the_flags_that_help(
    config, free_bytes, free_means, words
):
    with pytest.raises(NotEnoughMemory, match="100 tokens") as caught:
        choose(config, free_bytes, free_means=free_means)
    for expected in (words, "--max-model-len", "--kv-cache-dtype"):
        assert expected in str(caught.value)


def test_the_cache_has_a_key_and_a_value_tensor_per_layer_of_the_counted_size():
    caches = allocate_kv_caches(
        SPEC, num_blocks=5, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert len(caches) == 3
    assert all(tensor.shape == (5, 4, 2, 8) for pair in caches for tensor in pair)
    num_bytes = sum(tensor.nbytes for pair in caches for tensor in pair)
    assert num_bytes == 5 * block_bytes(SPEC, 4, torch.bfloat16)


def test_an_8_bit_cache_takes_half_of_16_bits_and_a_byte_for_each_scale():
    caches = allocate_kv_caches(
        SPEC, num_blocks=5, block_size=4, dtype=FP8, device=torch.device("cpu")
    )
    assert [tensor.dtype for tensor in caches[0]] == [FP8, FP8, torch.uint8, torch.uint8]
    assert [tensor.shape for tensor in caches[2]] == [(5, 4, 2, 8)] * 2 + [(5, 4, 2)] * 2
    num_bytes = sum(tensor.nbytes for layer in caches for tensor in layer)
    assert num_bytes == 5 * block_bytes(SPEC, 4, FP8)
    assert num_bytes == 5 * block_bytes(SPEC, 4, torch.bfloat16) * 9 // 16  # heads of 8


def test_a_cache_that_cannot_be_allocated_is_a_named_error():
    with pytest.raises(NotEnoughMemory, match="--kv-cache-memory-bytes"):
        allocate_kv_caches(
            SPEC, num_blocks=2**45, block_size=4, dtype=torch.float32, device=torch.device("cpu")
        )


def test_the_flag_chooses_the_type_of_the_cache():
    assert kv_cache_dtype(CacheConfig(), torch.float16) == torch.float16
    config = CacheConfig(kv_cache_dtype="bfloat16")
    assert kv_cache_dtype(config, torch.float32) == torch.bfloat16
    assert kv_cache_dtype(CacheConfig(kv_cache_dtype="fp8"), torch.float32) == FP8


@pytest.mark.parametrize(
    "available, expected", [(10**9, 5 * 10**8), (10**12, 4 * 2**30), (None, 4 * 2**30)]
)
def test_on_the_cpu_half_of_the_free_memory_up_to_a_limit(monkeypatch, available, expected):
    monkeypatch.setattr(kv_cache, "available_host_bytes", lambda: available)
    assert kv_cache.default_cpu_bytes() == expected
