import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernels.fused import (
    add_rms_norm,
    add_rms_norm_reference,
    apply_rotary,
    rms_norm,
    rms_norm_reference,
    silu_and_mul,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transformers_norm(weight, eps):
    norm = LlamaRMSNorm(len(weight), eps).to(weight.dtype)
    norm.weight.data.copy_(weight)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (3, 4, 48)])
@torch.no_grad()
def test_rms_norm_equals_transformers_bit_for_bit(dtype, shape):
    x, weight = randn(*shape, dtype=dtype) * 3, randn(shape[-1], seed=1, dtype=dtype)
    actual = rms_norm_reference(x, weight, 1e-5)
    assert actual.dtype == dtype
    assert torch.equal(actual, transformers_norm(weight, 1e-5)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_add_rms_norm_equals_the_two_steps_of_transformers(dtype):
    x, residual = randn(5, 64, dtype=dtype), randn(5, 64, seed=1, dtype=dtype)
    weight = randn(64, seed=2, dtype=dtype)
    normed, total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, transformers_norm(weight, 1e-6)(residual + x))


def test_add_rms_norm_leaves_its_arguments_alone():
    x, residual = randn(5, 64), randn(5, 64, seed=1)
    add_rms_norm(x, residual, torch.ones(64), 1e-6)
    assert torch.equal(x, randn(5, 64))
    assert torch.equal(residual, randn(5, 64, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 18)])
def test_rotary_equals_transformers_bit_for_bit(dtype, num_heads, num_kv_heads, head_dim):
    q = randn(9, num_heads, head_dim, dtype=dtype)
    k = randn(9, num_kv_heads, head_dim, seed=1, dtype=dtype)
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(100, 109).float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    both = torch.cat([angles, angles], dim=-1)[None]
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], both.cos().to(dtype), both.sin().to(dtype)
    )
    for ours, theirs in zip(apply_rotary(q, k, cos, sin), expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs[0].transpose(0, 1))


def test_rotary_at_position_zero_changes_nothing():
    q, k = randn(2, 4, 16), randn(2, 2, 16, seed=1)
    rotated_q, rotated_k = apply_rotary(q, k, torch.ones(2, 8), torch.zeros(2, 8))
    assert torch.equal(rotated_q, q)
    assert torch.equal(rotated_k, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_and_mul_equals_transformers_bit_for_bit_in_half_types(dtype):
    gate_up = randn(11, 2 * 172, dtype=dtype) * 4
    gate, up = gate_up.chunk(2, dim=1)
    assert torch.equal(silu_and_mul(gate_up), torch.nn.functional.silu(gate) * up)


def test_silu_and_mul_equals_transformers_but_for_the_last_bits_in_float32():
    gate_up = torch.cat([torch.linspace(-200, 200, 999), randn(999)])[None]
    gate, up = gate_up.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(silu_and_mul(gate_up).double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 1408])
@pytest.mark.usefixtures("num_threads")
def test_a_row_has_the_same_bits_alone_and_in_company(dtype, size):
    x, residual = randn(60, size, dtype=dtype), randn(60, size, seed=1, dtype=dtype)
    gate_up, weight = randn(60, 2 * size, dtype=dtype), randn(size, seed=2, dtype=dtype)
    together = (
        rms_norm(x, weight, 1e-6), add_rms_norm(x, residual, weight, 1e-6)[0], silu_and_mul(gate_up)
    )  # fmt: skip
    for place in (0, 15, 29, 30, 59):
        row = slice(place, place + 1)
        alone = (
            rms_norm(x[row], weight, 1e-6),
            add_rms_norm(x[row], residual[row], weight, 1e-6)[0],
            silu_and_mul(gate_up[row]),
        )
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[place])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_does_not_show_where_threads_share_a_long_tensor(dtype):
    gate_up = randn(97, 2 * 1000, dtype=dtype) * 4
    together = silu_and_mul(gate_up)
    for place in range(97):
        assert torch.equal(silu_and_mul(gate_up[place : place + 1])[0], together[place])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, torch.ones(9), 1e-6), r"weight.shape: expected \(8,\), got \(9,\)"),
        (lambda x: rms_norm(x, torch.ones(8).half(), 1e-6), "weight.dtype: expected torch.float32"),
        (lambda x: add_rms_norm(x, x[:1], torch.ones(8), 1e-6), r"residual.shape: expected \(2, 8"),
        (lambda x: add_rms_norm(x, x.half(), torch.ones(8), 1e-6), "residual.dtype"),
        (lambda x: silu_and_mul(x[:, :7]), r"gate_up.shape\[-1\]: expected an even number, got 7"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("q", "k", "cos", "sin", "message"),
    [
        ((2, 4, 7), (2, 4, 7), (2, 3), (2, 3), "head_dim: expected an even number, got 7"),
        ((2, 4, 8), (3, 4, 8), (2, 4), (2, 4), r"k.shape\[::2\]: expected \(2, 8\), got \(3, 8\)"),
        ((2, 4, 8), (2, 4, 6), (2, 4), (2, 4), r"k.shape\[::2\]: expected \(2, 8\), got \(2, 6\)"),
        ((2, 4, 8), (2, 4, 8), (2, 8), (2, 4), r"cos.shape: expected \(2, 4\), got \(2, 8\)"),
        ((2, 4, 8), (2, 4, 8), (2, 4), (1, 4), r"sin.shape: expected \(2, 4\), got \(1, 4\)"),
    ],
)
def test_wrong_shapes_of_rotary_are_named(q, k, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(q), torch.zeros(k), torch.zeros(cos), torch.zeros(sin))


def test_rotary_refuses_keys_of_another_dtype():
    with pytest.raises(ValueError, match=r"k\.dtype: expected"):
        apply_rotary(
            torch.zeros(2, 4, 8), torch.zeros(2, 4, 8).half(), torch.zeros(2, 4), torch.zeros(2, 4)
        )
