import numpy as np
import pytest
import torch

from kernels.attention_input import rotate_and_cache_in_steps
from kernels.fp8_cache import FP8, quantize_heads, scale_values
from kernels.fused import add_rms_norm_reference, rms_norm_reference, silu_and_mul_reference
from kernels.gpu import fp8, rotary, rows
from tests.kernels.gpu.ptx_emulator import Block

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Sums have another order; the interpreter truncates to bfloat16, several times over.
NOISE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype
    error = (actual.cpu().double() - expected.double()).abs().max()
    assert error <= NOISE[dtype] * expected.double().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (2, 3, 1030)])
def test_rms_norm(dtype, shape, device):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], seed=1, dtype=dtype)
    assert rows.accepts_rms_norm(x.to(device), weight.to(device), 1e-5)
    actual = rows.rms_norm(x.to(device), weight.to(device), 1e-5)
    assert actual.shape == shape
    assert_near(actual, rms_norm_reference(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 2050])
def test_add_rms_norm_of_slices_of_wider_rows(dtype, size, device):
    x, residual = (randn(3, 2 * size, seed=seed, dtype=dtype)[:, :size] for seed in (1, 2))
    weight = randn(size, seed=3, dtype=dtype)
    arguments = x.to(device), residual.to(device), weight.to(device), 1e-6
    assert rows.accepts_add_rms_norm(*arguments)
    normed, total = rows.add_rms_norm(*arguments)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert_near(normed, expected, dtype)
    assert_near(total, expected_total, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 1000, 1025])
def test_silu_and_mul(dtype, size, device):
    gate_up = randn(3, 2 * size, dtype=dtype) * 3
    assert rows.accepts_silu_and_mul(gate_up.to(device))
    assert_near(rows.silu_and_mul(gate_up.to(device)), silu_and_mul_reference(gate_up), dtype)


def test_a_row_has_the_same_bits_alone_and_in_company(device):
    x, weight = randn(4, 300).half().to(device), randn(300).half().to(device)
    together = rows.rms_norm(x, weight, 1e-6)
    assert torch.equal(rows.rms_norm(x[2:3], weight, 1e-6)[0], together[2])


def test_empty_batches_are_fine(device):
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert rows.rms_norm(x, weight, 1e-6).shape == (0, 64)
    assert rows.silu_and_mul(x).shape == (0, 32)


class Heads:
    """Queries, keys and values as slices of one projection, angles, slots and empty caches."""

    def __init__(self, dtype, num_heads, num_kv_heads, head_dim, cache_dtype, has_norm, device):
        num_tokens, block_size, blocks = 5, 4, 3
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        fused = randn(num_tokens, sum(sizes), dtype=dtype).to(device)
        heads = [part.view(num_tokens, -1, head_dim) for part in fused.split(sizes, dim=1)]
        angles = randn(num_tokens, head_dim // 2, seed=1).to(device)
        shape = (blocks, block_size, num_kv_heads, head_dim)
        caches = [torch.zeros(shape, device=device).to(cache_dtype) for _ in range(2)]
        scales = [torch.zeros(shape[:3], dtype=torch.uint8, device=device) for _ in range(2)]
        slots = torch.tensor([7, -1, 0, 11, 2], device=device)
        norms = [randn(head_dim, seed=seed, dtype=dtype).to(device) for seed in (2, 3)]
        self.caches = *caches, *scales
        self.arguments = (
            *heads, angles.cos(), angles.sin(), *caches, slots, tuple(norms) if has_norm else None,
            1e-5, tuple(scales) if cache_dtype == FP8 else None,
        )  # fmt: skip


def on_cpu(arguments):
    move = lambda x: x.cpu().clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [tuple(map(move, x)) if isinstance(x, tuple) else move(x) for x in arguments]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 1, 96), (6, 2, 128), (5, 5, 18)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotating_and_storing(dtype, shape, has_norm, device):
    case = Heads(dtype, *shape, dtype, has_norm, device)
    expected_arguments = on_cpu(case.arguments)
    assert rotary.accepts(*case.arguments)
    actual = rotary.run(*case.arguments)
    expected = rotate_and_cache_in_steps(*expected_arguments)
    assert_near(actual, expected, dtype)
    for ours, theirs in zip(case.caches[:2], expected_arguments[5:7], strict=True):
        assert_near(ours, theirs, dtype)
        assert torch.equal(ours.cpu().any(3), theirs.any(3))  # in their slots, nowhere else


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(4, 4, 64), (8, 1, 96)])
def test_storing_in_eight_bits_gives_the_reference_s_bytes(dtype, shape, device):
    case = Heads(dtype, *shape, FP8, False, device)
    expected = on_cpu(case.arguments)
    assert rotary.accepts(*case.arguments)
    rotary.run(*case.arguments)
    rotate_and_cache_in_steps(*expected)
    _, _, k_scales, v_scales = case.caches
    assert torch.equal(k_scales.cpu(), expected[10][0])
    assert torch.equal(v_scales.cpu(), expected[10][1])
    for ours, theirs in zip(case.caches[:2], expected[5:7], strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


def test_another_dtype_than_the_cache_s_is_rounded_to_it(device):
    case = Heads(torch.float32, 2, 2, 16, torch.float16, False, device)
    expected = on_cpu(case.arguments)
    rotary.run(*case.arguments)
    rotate_and_cache_in_steps(*expected)
    assert_near(case.caches[0], expected[5], torch.float16)


def test_all_numbers_from_the_smallest_to_the_largest_become_the_reference_s_codes(device):
    num = 160
    powers = torch.linspace(-140, 125, num).exp2()
    x = torch.cat([powers[:, None] * randn(num, 62), powers[:, None], -powers[:, None]], 1)
    x[0] = 0
    x[1, 0], x[2, 0], x[3, 0] = torch.nan, torch.inf, -torch.inf
    scales = torch.zeros(num // 4, 1, 4, dtype=torch.uint8, device=device)
    cache = torch.zeros(num // 4, 1, 4, 64, device=device).to(FP8)
    heads = x.view(-1, 4, 64).to(device)
    zeros, slots = torch.zeros(num // 4, 32, device=device), torch.arange(num // 4, device=device)
    rotary.run(
        heads, heads, heads, zeros + 1, zeros, cache.clone(), cache, slots, None, 0.0,
        (scales.clone(), scales),
    )  # fmt: skip
    codes, expected = quantize_heads(x)
    assert torch.equal(scales.cpu().flatten(), expected)
    assert not scale_values(expected)[1:4].isfinite().any()
    actual = cache.cpu().view(torch.uint8).view(num, 64)
    assert torch.equal(actual[4:], codes[4:].view(torch.uint8))


def test_quantised_heads_are_as_near_as_eight_bits_can_be():
    x = randn(1000, 64) * torch.logspace(-20, 20, 1000)[:, None]
    codes, scales = quantize_heads(x)
    error = (codes.double() * scale_values(scales).double()[:, None] - x.double()).abs()
    bound = torch.maximum(x.double().abs() * 2**-4, scale_values(scales).double()[:, None] * 2**-10)
    assert (error <= bound).all()
    assert codes.float().abs().amax(dim=1).min() >= 224  # no head wastes more than one power


@pytest.mark.parametrize(("ptx", "shift"), [(fp8.EVEN_PTX, 0), (fp8.ODD_PTX, 8)])
def test_the_assembly_reads_every_pair_of_codes(ptx, shift):
    codes = np.arange(256, dtype=np.uint32)
    other = codes[::-1].copy()
    low, high = codes << shift | other << (8 - shift), other << shift | codes << (8 - shift)
    block = Block(256, {1: low | high << 16}).run(ptx.value)
    halves = block.registers["$0"]
    values = [(halves >> 16 * i & 0xFFFF).astype(np.uint16).view(np.float16) for i in range(2)]
    for ours, theirs in zip(values, (codes, other), strict=True):
        expected = torch.from_numpy(theirs.astype(np.uint8)).view(FP8).float().numpy()
        finite = np.isfinite(expected)
        assert np.array_equal(ours.astype(np.float32)[finite] * 2**fp8.BIAS, expected[finite])


@pytest.mark.parametrize("what", ["strides", "angles", "devices"])
def test_what_the_kernel_is_not_made_for_is_declined(what, device):
    arguments = list(Heads(torch.float32, 2, 2, 16, torch.float32, False, device).arguments)
    if what == "strides":
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    elif what == "angles":
        arguments[3] = arguments[3].half()
    else:
        arguments[7] = torch.zeros(5, dtype=torch.int64, device="meta")
    assert not rotary.accepts(*arguments)
