import pytest
import torch

from kernels.linear import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_right_for_any_number_of_tokens(dtype, num_tokens, with_bias):
    x, weight = randn(num_tokens, 80, dtype=dtype), randn(24, 80, seed=1, dtype=dtype) / 9
    bias = randn(24, seed=2, dtype=dtype) if with_bias else None
    expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0.0)
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(64, 64), (37, 8), (37, 24), (6, 100), (1, 5), (129, 3), (256, 8), (100, 37), (200, 136)],
)
@pytest.mark.usefixtures("num_threads")
def test_a_token_has_the_same_bits_alone_and_in_any_company(dtype, in_features, out_features):
    weight = randn(out_features, in_features, dtype=dtype)
    bias = randn(out_features, seed=1, dtype=dtype)
    token = randn(1, in_features, seed=2, dtype=dtype)
    alone = linear(token, weight, bias)
    for num_tokens in (2, 7, 16, 33, 50):
        for place in {0, num_tokens // 2, num_tokens - 1}:
            x = randn(num_tokens, in_features, seed=num_tokens, dtype=dtype) * 100
            x[place] = token
            assert torch.equal(linear(x, weight, bias)[place], alone[0])


def test_neighbours_that_are_not_finite_do_no_harm():
    weight, x = randn(24, 64), randn(20, 64, seed=1)
    expected = linear(x, weight)
    x[3], x[19] = float("nan"), float("inf")
    actual = linear(x, weight)
    kept = [i for i in range(20) if i not in (3, 19)]
    assert torch.equal(actual[kept], expected[kept])


def test_x_may_be_a_slice_of_a_wider_tensor():
    wide, weight = randn(20, 128), randn(24, 64, seed=1)
    assert torch.equal(linear(wide[:, :64], weight), linear(wide[:, :64].clone(), weight))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(4, 9), None, r"x.shape\[1\]: expected 9, got 8"),
        (torch.zeros(8), torch.zeros(4, 8), None, r"x.dim\(\): expected 2, got 1"),
        (torch.zeros(2, 8), torch.zeros(8), None, r"weight.dim\(\): expected 2, got 1"),
        (torch.zeros(2, 8).half(), torch.zeros(4, 8), None, "x.dtype: expected torch.float32"),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(5), r"bias.shape: expected \(4,\)"),
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4).half(), "bias.dtype"),
    ],
)
def test_wrong_arguments_are_named(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        linear(x, weight, bias)
