"""Native products against the references, on every instruction set that this machine runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.layout import relayout_reference
from kernels.linear import linear_reference
from kernels.native.build import BuildError
from kernels.native.library import load
from kernels.native.operations import NativeOperations
from kernels.nf4 import QuantizedWeight, dequantize_4bit_reference, quantize_4bit
from kernels.nf4_linear import nf4_linear_reference
from kernels.threads import set_num_threads

try:
    LIBRARY = load("auto")
    SETS = LIBRARY.herd_instruction_sets().decode().split()
except BuildError as error:
    pytest.skip(f"no native kernels: {error}", allow_module_level=True)

SHAPES = [(8, 64), (13, 128), (1, 192), (50, 448)]
DTYPES = [torch.float32, torch.bfloat16]
NUM_TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 33]
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Of the largest value: sums in another order, rounded once."""


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
    largest = expected.float().abs().max().item() if expected.numel() else 0.0
    atol = NOISE[expected.dtype] * largest
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_is_reversible_and_equals_the_reference(native, shape):
    weight = quantize_4bit(random(*shape))
    ours = native.relayout(weight.packed, shape, "interleaved")
    assert torch.equal(ours, relayout_reference(weight.packed, shape, "interleaved"))
    assert torch.equal(native.relayout(ours, shape, "stock"), weight.packed)
    assert torch.equal(relayout_reference(ours, shape, "stock"), weight.packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4"}, {"double_quant": False}])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_weights_equal_the_reference_to_the_bit(native, shape, options, dtype):
    weight = quantize_4bit(random(*shape, dtype=torch.bfloat16), **options)
    ours = native.dequantize_4bit(native.prepare_weight(weight), dtype)
    assert torch.equal(ours, dequantize_4bit_reference(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_nf4_linear_equals_the_reference(native, num_tokens, dtype):
    x = random(num_tokens, 192, dtype=dtype)
    weights = [
        quantize_4bit(random(24, 192)),
        quantize_4bit(random(9, 192), quant_type="fp4"),
        quantize_4bit(random(3, 192), double_quant=False, group_size=64),
    ]
    biases = [random(24, dtype=dtype), None, random(3, dtype=dtype)]
    actual = native.nf4_linear(x, [native.prepare_weight(w) for w in weights], biases)
    assert_close(actual, nf4_linear_reference(x, weights, biases))


def test_sums_are_closer_to_the_exact_weights_than_rounded_weights_are(native):
    x, weight = random(4, 2048, dtype=torch.bfloat16), quantize_4bit(random(64, 2048))
    exact = x.double() @ dequantize_4bit_reference(weight, torch.float32).double().t()
    rounded = x.double() @ dequantize_4bit_reference(weight, torch.bfloat16).double().t()
    ours = native.nf4_linear(x, [native.prepare_weight(weight)], [None]).double()
    of_the_result = (exact - exact.bfloat16().double()).norm()  # bfloat16, too
    assert (ours - exact).norm() ** 2 < (rounded - exact).norm() ** 2 + of_the_result**2


def test_wide_groups_share_a_scale(native):
    weight = quantize_4bit(random(10, 512), group_size=256)
    x = random(2, 512, dtype=torch.bfloat16)
    actual = native.nf4_linear(x, [native.prepare_weight(weight)], [None])
    assert_close(actual, nf4_linear_reference(x, [weight], [None]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_linear_equals_the_reference(native, num_tokens, dtype):
    x, weight = random(num_tokens, 128, dtype=dtype), random(37, 128, dtype=dtype)
    bias = random(37, dtype=dtype)
    assert_close(native.linear(x, weight, bias), linear_reference(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [192, 4160])  # the longer one in stretches
def test_a_token_has_the_same_bits_in_any_company(native, width, dtype):
    x = random(70, width, dtype=dtype)
    weight = native.prepare_weight(quantize_4bit(random(43, width)))
    dense = random(43, width, dtype=dtype)
    quantized_alone = torch.cat([native.nf4_linear(row[None], [weight], [None]) for row in x])
    dense_alone = torch.cat([native.linear(row[None], dense, None) for row in x])
    for num_tokens in (*range(2, 21), 70):
        together = native.nf4_linear(x[:num_tokens], [weight], [None])
        assert torch.equal(together, quantized_alone[:num_tokens])
        assert torch.equal(native.linear(x[:num_tokens], dense, None), dense_alone[:num_tokens])


def test_freed_scratch_is_taken_again(native):
    x, weight = random(70, 192), native.prepare_weight(quantize_4bit(random(43, 192)))
    before = native.nf4_linear(x, [weight], [None])
    for _ in range(2):
        native.free_scratch()
    assert torch.equal(native.nf4_linear(x, [weight], [None]), before)


def test_results_do_not_depend_on_the_number_of_threads(native):
    x = random(5, 1024, dtype=torch.bfloat16)
    weight = native.prepare_weight(quantize_4bit(random(1000, 1024)))
    before, results = torch.get_num_threads(), []
    for num_threads in (1, 2, 5):
        set_num_threads(num_threads)
        results.append(native.nf4_linear(x, [weight], [None]))
    set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_groups_that_span_rows_are_left_to_the_reference(native):
    assert not native.accepts_prepare_weight(quantize_4bit(random(8, 96)))
    assert not native.accepts_prepare_weight(quantize_4bit(random(8, 64), group_size=128))
    assert not native.accepts_prepare_weight(quantize_4bit(random(8, 64), group_size=32))
    assert not native.accepts_linear(random(1, 72), random(8, 72))
    assert not native.accepts_linear(random(1, 64).half(), random(8, 64).half())


@pytest.fixture(params=[name for name in SETS if load(name).herd_has_int8_activations()])
def native_int8(request):
    """The operations on an instruction set that multiplies bytes."""
    yield NativeOperations(load(request.param))
    load("auto")


def rounding(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight, to be multiplied with 8-bit activations."""
    return replace(weight, int8_activations=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
def test_8_bit_activations_equal_the_reference(native_int8, num_tokens, dtype):
    x = random(num_tokens, 192, dtype=dtype)
    x[0, 64:128] = 0.0
    weights = [
        rounding(quantize_4bit(random(40, 192))),
        rounding(quantize_4bit(random(9, 192), quant_type="fp4")),
        rounding(quantize_4bit(random(3, 192), double_quant=False)),
    ]
    biases = [random(40, dtype=dtype), None, random(3, dtype=dtype)]
    prepared = [native_int8.prepare_weight(weight) for weight in weights]
    assert native_int8.accepts_nf4_linear(x, prepared, biases)
    actual = native_int8.nf4_linear(x, prepared, biases)
    assert_close(actual, nf4_linear_reference(x, weights, biases))
    assert_close(
        nf4_linear_reference(x, prepared, biases), nf4_linear_reference(x, weights, biases)
    )


def test_8_bit_activations_cost_little_accuracy(native_int8):
    x, weight = random(16, 1024, dtype=torch.bfloat16), quantize_4bit(random(64, 1024))
    exact = x.float() @ dequantize_4bit_reference(weight, torch.float32).t()
    ours = native_int8.nf4_linear(x, [native_int8.prepare_weight(rounding(weight))], [None])
    assert (ours.float() - exact).norm() < 0.015 * exact.norm()


def test_8_bit_activations_give_a_token_the_same_bits_in_any_company(native_int8):
    x = random(40, 832, dtype=torch.bfloat16)
    weight = native_int8.prepare_weight(rounding(quantize_4bit(random(43, 832))))
    alone = torch.cat([native_int8.nf4_linear(row[None], [weight], [None]) for row in x])
    for num_tokens in (2, 3, 7, 8, 9, 17, 40):
        together = native_int8.nf4_linear(x[:num_tokens], [weight], [None])
        assert torch.equal(together, alone[:num_tokens])


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_8_bit_activations_do_not_hide_what_is_not_finite(native_int8, fault):
    x = random(3, 128, dtype=torch.bfloat16)
    x[1, 70] = fault
    weight = native_int8.prepare_weight(rounding(quantize_4bit(random(40, 128))))
    finite = native_int8.nf4_linear(x, [weight], [None]).isfinite()
    assert finite[[0, 2]].all() and not finite[1].any()


def test_weights_that_want_other_activations_are_left_to_the_reference(native):
    weight = native.prepare_weight(quantize_4bit(random(8, 64)))
    x = random(1, 64)
    mixed = [weight, rounding(weight)]
    assert not native.accepts_nf4_linear(x, mixed, [None, None])
    assert native.accepts_nf4_linear(x, [rounding(weight)], [None]) == native.has_int8_activations()
    both = nf4_linear_reference(x, mixed, [None, None])
    assert_close(both[:, :8], nf4_linear_reference(x, [weight], [None]))
