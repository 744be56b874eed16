import bitsandbytes as bnb
import pytest
import torch

from kernels.linear import linear
from kernels.nf4 import dequantize_4bit, quantize_4bit
from kernels.nf4_linear import nf4_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_the_numbers_are_bitsandbytes(dtype, quant_type, double_quant, num_tokens):
    weight = randn(48, 128, dtype=dtype) * 0.1
    bias, x = randn(48, seed=1, dtype=dtype), randn(num_tokens, 128, seed=2, dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type
    )
    expected = bnb.matmul_4bit(x, packed, state, bias=bias)
    ours = quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
    actual = nf4_linear(x, [ours], [bias])
    assert actual.dtype == dtype
    noise = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(actual, expected, rtol=noise, atol=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 80), (7, 37), (16, 48)])  # groups that straddle rows
def test_it_is_the_dense_product_with_the_dequantised_weight(dtype, shape):
    weight = quantize_4bit(randn(*shape))
    x = randn(21, shape[1], seed=1, dtype=dtype)
    assert torch.equal(
        nf4_linear(x, [weight], [None]), linear(x, dequantize_4bit(weight, dtype), None)
    )


def test_slices_of_a_fused_projection_stand_side_by_side():
    weights = [quantize_4bit(randn(out, 64, seed=out)) for out in (32, 8, 9)]
    biases = [randn(32), None, randn(9)]
    x = randn(20, 64, seed=1)
    expected = [nf4_linear(x, [w], [b]) for w, b in zip(weights, biases, strict=True)]
    actual = nf4_linear(x, weights, biases)
    assert actual.shape == (20, 49)
    torch.testing.assert_close(actual, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_in_company(dtype):
    weights = [quantize_4bit(randn(out, 96, seed=out)) for out in (24, 40)]
    x = randn(37, 96, seed=1, dtype=dtype)
    together = nf4_linear(x, weights, [None, None])
    for place in (0, 15, 16, 36):
        alone = nf4_linear(x[place : place + 1], weights, [None, None])
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize(
    ("x", "biases", "message"),
    [
        (torch.zeros(2, 32), [None], r"x.shape\[1\]: expected 64, got 32"),
        (torch.zeros(64), [None], r"x.dim\(\): expected 2, got 1"),
        (torch.zeros(2, 64, dtype=torch.float64), [None], "x.dtype"),
        (torch.zeros(2, 64), [], r"len\(biases\): expected 1, got 0"),
        (torch.zeros(2, 64), [torch.zeros(7)], r"bias.shape: expected \(8,\), got \(7,\)"),
        (torch.zeros(2, 64), [torch.zeros(8).half()], "bias.dtype"),
    ],
)
def test_wrong_arguments_are_named(x, biases, message):
    with pytest.raises(ValueError, match=message):
        nf4_linear(x, [quantize_4bit(randn(8, 64))], biases)


def test_a_call_without_weights_is_refused():
    with pytest.raises(ValueError, match="weights: expected at least one, got 0"):
        nf4_linear(torch.zeros(2, 64), [], [])
