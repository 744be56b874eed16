import pytest
import torch

from kernels.int8_linear import (
    ROWS,
    Int8Weight,
    dequantize_int8,
    int8_linear,
    int8_linear_reference,
    quantize_int8,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_errs_by_half_a_step_of_each_row(dtype):
    weight = randn(33, 80, dtype=dtype)
    weight[5] = 0
    weight[6] *= 1e-3
    quantized = quantize_int8(weight)
    assert quantized.codes.abs().amax(dim=1).tolist() == [127] * 5 + [0] + [127] * 27
    error = (quantized.codes * quantized.scales[:, None] - weight.float()).abs()
    assert bool((error <= 0.5001 * quantized.scales[:, None]).all())
    assert dequantize_int8(quantized).dtype is dtype
    assert quantized.num_bytes == 33 * 80 + 33 * 4


def test_more_rows_than_are_handled_at_a_time_make_no_difference():
    weight = randn(ROWS + 3, 64)
    whole, tail = quantize_int8(weight), quantize_int8(weight[ROWS:])
    assert torch.equal(whole.codes[ROWS:], tail.codes)
    x = randn(2, 64, seed=1)
    assert torch.equal(
        int8_linear_reference(x, whole, None)[:, ROWS:], int8_linear_reference(x, tail, None)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 128), (7, 37), (40, 2112), (131, 64)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_the_codes_scaled_once(dtype, shape, num_tokens, has_bias):
    weight = quantize_int8(randn(*shape))
    x = randn(num_tokens, shape[1], seed=1, dtype=dtype)
    bias = randn(shape[0], seed=2, dtype=dtype) if has_bias else None
    exact = (x.double() @ weight.codes.double().T) * weight.scales.double()
    if bias is not None:
        exact += bias.double()
    noise = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for run in (int8_linear, int8_linear_reference):
        actual = run(x, weight, bias)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, rtol=noise, atol=4e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_in_company(dtype):
    weight, x = quantize_int8(randn(45, 192)), randn(37, 192, seed=1, dtype=dtype)
    together = int8_linear(x, weight)
    for place in (0, 15, 16, 36):
        assert torch.equal(int8_linear(x[place : place + 1], weight)[0], together[place])


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 32), None, r"x.shape\[1\]: expected 64, got 32"),
        (torch.zeros(64), None, r"x.dim\(\): expected 2, got 1"),
        (torch.zeros(2, 64, dtype=torch.float64), None, "x.dtype"),
        (torch.zeros(2, 64), torch.zeros(7), r"bias.shape: expected \(8,\), got \(7,\)"),
    ],
)
def test_wrong_arguments_are_named(x, bias, message):
    with pytest.raises(ValueError, match=message):
        int8_linear(x, quantize_int8(randn(8, 64)), bias)


def test_values_that_are_not_finite_are_refused():
    weight = randn(8, 64)
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values"):
        quantize_int8(weight)


def test_fields_that_disagree_are_refused():
    codes = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"scales.shape: expected \(4,\), got \(3,\)"):
        Int8Weight(codes=codes, scales=torch.zeros(3), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"codes.dtype: expected torch.int8"):
        Int8Weight(codes=codes.int(), scales=torch.zeros(4), dtype=torch.float32)
