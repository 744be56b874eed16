"""Native norms, rotation, attention, adapters against the references, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from kernels import fused, lora, paged_attention
from kernels.native.build import BuildError
from kernels.native.library import load
from kernels.native.operations import NativeOperations

try:
    SETS = load("auto").herd_instruction_sets().decode().split()
except BuildError as error:
    pytest.skip(f"no native kernels: {error}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(params=SETS)
def native(request):
    """The operations on one instruction set."""
    yield NativeOperations(load(request.param))
    load("auto")


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * shape[0])
    return torch.randn(*shape, generator=generator).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    noise = NOISE[expected.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=noise, atol=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 64, 101])
def test_norms_equal_the_reference(native, size, dtype):
    x, residual, weight = (random(n, size, dtype=dtype) for n in (5, 5, 1))
    residual = residual.flip(0).contiguous()
    assert_close(native.rms_norm(x, weight[0], 1e-5), fused.rms_norm_reference(x, weight[0], 1e-5))
    actual = native.add_rms_norm(x, residual, weight[0], 1e-5)
    expected = fused.add_rms_norm_reference(x, residual, weight[0], 1e-5)
    assert_close(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 24, 64])
def test_rotation_equals_the_reference_to_the_bit(native, head_dim, dtype):
    qkv = random(7, 5 * head_dim, dtype=dtype)
    q, k = qkv[:, : 3 * head_dim].view(7, 3, -1), qkv[:, 3 * head_dim :].view(7, 2, -1)
    angles = random(7, head_dim // 2)
    args = (q, k, angles.cos(), angles.sin())
    assert native.accepts_apply_rotary(*args)
    for actual, expected in zip(
        native.apply_rotary(*args), fused.apply_rotary_reference(*args), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 37, 4100])
def test_silu_and_mul_equals_the_reference(native, size, dtype):
    gate_up = 20 * random(3, 2 * size, dtype=dtype)
    assert_close(native.silu_and_mul(gate_up), fused.silu_and_mul_reference(gate_up))


def paged_case(head_dim, dtype, *, num_heads=4, num_kv_heads=2, block_size=4):
    """Single tokens and prompt chunks, blocks in disorder, NaN where nobody may look."""
    lens, new = [1, 70, 9, 200, 64], [1, 1, 9, 33, 2]
    num_blocks = [-(-n // block_size) for n in lens]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(1)).tolist()
    tables = torch.full((len(lens), max(num_blocks)), -1, dtype=torch.int32)
    shape = (sum(num_blocks) + 1, block_size, num_kv_heads, head_dim)
    caches = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
    for seq, length in enumerate(lens):
        blocks = [order.pop() for _ in range(num_blocks[seq])]
        tables[seq, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = [blocks[i // block_size] * block_size + i % block_size for i in range(length)]
        for number, cache in enumerate(caches):
            values = random(length, num_kv_heads, head_dim, dtype=dtype, seed=number)
            cache.flatten(0, 1)[slots] = values
    bounds = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
    q = random(sum(new), num_heads, head_dim, dtype=dtype)
    return (q, *caches, tables, torch.tensor(lens, dtype=torch.int32), bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 65])
@pytest.mark.parametrize(("head_dim", "heads"), [(16, (4, 2)), (48, (3, 3)), (128, (8, 1))])
def test_attention_equals_the_reference(native, head_dim, heads, window, dtype):
    case = paged_case(head_dim, dtype, num_heads=heads[0], num_kv_heads=heads[1])
    assert native.accepts_paged_attention(*case)
    scale = head_dim**-0.5
    actual = native.paged_attention(*case, scale, window)
    expected = paged_attention.paged_attention_reference(*case, scale, window)
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_token_has_the_bits_of_a_prompt_chunk(native, dtype):
    q, k_cache, v_cache, tables, lens, bounds = paged_case(64, dtype)
    together = native.paged_attention(q, k_cache, v_cache, tables, lens, bounds, 0.125, None)
    for seq in range(len(lens)):
        first, stop = bounds[seq].item(), bounds[seq + 1].item()
        for token in range(first, stop):
            length = lens[seq : seq + 1] - (stop - 1 - token)
            one = torch.tensor([0, 1], dtype=torch.int32)
            alone = native.paged_attention(
                q[token : token + 1], k_cache, v_cache, tables[seq : seq + 1], length.int(), one,
                0.125, None,
            )  # fmt: skip
            assert torch.equal(alone[0], together[token])


def test_keys_and_values_are_stored_in_their_slots(native):
    kv = random(3, 2 * 2 * 16, dtype=torch.bfloat16)
    k, v = kv[:, :32].view(3, 2, 16), kv[:, 32:].view(3, 2, 16)
    slots = torch.tensor([5, -1, 2])
    caches = [torch.zeros(2, 4, 2, 16, dtype=torch.bfloat16) for _ in range(4)]
    native.write_kv_cache(k, v, caches[0], caches[1], slots)
    paged_attention.write_kv_cache_reference(k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def lora_case(dtype, num_tokens=9):
    """Two slices; adapters of ranks 3, 16 and 40, one of which leaves the second slice alone."""

    def pair(rank: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = random(rank, 128, dtype=dtype, seed=width), random(rank, width, dtype=dtype).t()
        return 0.1 * a, 0.1 * b

    slices = [
        lora.LoraSlice(0, 10, [pair(3, 10), None, pair(16, 10), pair(40, 10)]),
        lora.LoraSlice(10, 31, [pair(3, 21), None, None, pair(17, 21)]),
    ]
    indices = torch.tensor([2, -1, 3, 0, 3, 3, 2, -1, 0], dtype=torch.int32)[:num_tokens]
    scales = torch.linspace(0.5, 2.0, 9)[:num_tokens]
    return (
        random(num_tokens, 31, dtype=dtype),
        random(num_tokens, 128, dtype=dtype),
        slices,
        indices,
        scales,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_equal_the_reference(native, dtype):
    y, x, slices, indices, scales = lora_case(dtype)
    assert native.accepts_add_lora(y, x, slices, indices, scales)
    expected = y.clone()
    lora.add_lora_reference(expected, x, slices, indices, scales)
    native.add_lora(y, x, slices, indices, scales)
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_with_an_adapter_has_the_same_bits_in_any_company(native, dtype):
    y, x, slices, indices, scales = lora_case(dtype)
    together = y.clone()
    native.add_lora(together, x, slices, indices, scales)
    for token in range(len(x)):
        one = slice(token, token + 1)
        alone = y[one].clone()
        native.add_lora(alone, x[one], slices, indices[one], scales[one])
        assert torch.equal(alone[0], together[token])
