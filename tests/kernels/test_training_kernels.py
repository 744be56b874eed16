"""Gradients of the small operations and of log-probabilities; products for many tokens."""

import pytest
import torch

from kernels.fused import rms_norm_reference, silu_and_mul_reference
from kernels.fused_backward import (
    rms_norm_backward,
    rms_norm_backward_reference,
    silu_and_mul_backward,
    silu_and_mul_backward_reference,
)
from kernels.label_logps import label_logps, label_logps_reference
from kernels.native.build import BuildError
from kernels.native.library import load
from kernels.native.operations import NativeOperations
from kernels.native.training import NativeTraining
from kernels.native.training_self_test import failing_training_operations
from kernels.nf4 import quantize_4bit
from kernels.nf4_autograd import (
    nf4_linear_backward,
    nf4_linear_backward_reference,
    nf4_linear_training,
)
from kernels.nf4_linear import nf4_linear_reference, prepare_weight
from kernels.product import product

try:
    SETS = load("auto").herd_instruction_sets().decode().split()
except BuildError:
    SETS = []

DTYPES = [torch.float32, torch.bfloat16]
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Of the largest value."""


@pytest.fixture(params=SETS or [pytest.param("none", marks=pytest.mark.skip("no native kernels"))])
def native(request):
    """Training's operations on one instruction set."""
    yield NativeTraining(load(request.param))
    load("auto")


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    atol = NOISE[expected.dtype] * expected.float().abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("size", [64, 19, 200])
def test_the_norms_gradient_is_autograds(size):
    x, weight, grad = (
        random(5, size).requires_grad_(),
        random(size, seed=1),
        random(5, size, seed=2),
    )
    (expected,) = torch.autograd.grad(rms_norm_reference(x, weight, 1e-5), x, grad)
    actual = rms_norm_backward_reference(x.detach(), weight, grad, 1e-5)
    assert_close(actual, expected)
    assert_close(rms_norm_backward(x.detach(), weight, grad, 1e-5), expected)


@pytest.mark.parametrize("size", [64, 19, 200])
def test_silu_times_ups_gradient_is_autograds(size):
    x, grad = random(5, 2 * size).requires_grad_(), random(5, size, seed=2)
    (expected,) = torch.autograd.grad(silu_and_mul_reference(x), x, grad)
    assert_close(silu_and_mul_backward_reference(x.detach(), grad), expected)
    assert_close(silu_and_mul_backward(x.detach(), grad), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_label_logps_are_log_softmaxs_with_its_gradient(temperature):
    logits, labels = random(6, 97).requires_grad_(), torch.tensor([0, 5, 96, 40, 41, 5])
    slopes = random(6, seed=3)
    expected = (logits / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (expected_grad,) = torch.autograd.grad(expected, logits, slopes)
    for function in (label_logps, label_logps_reference):
        used = logits.detach().clone()
        logps, is_correct = function(used, labels, slopes, temperature)
        torch.testing.assert_close(logps, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(used, expected_grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(is_correct, logits.argmax(-1) == labels)


def test_without_slopes_the_logits_stay(native):
    logits, labels = random(3, 97), torch.tensor([0, 5, 96])
    before = logits.clone()
    native.label_logps(logits, labels, None, 1.0)
    assert torch.equal(logits, before)


def test_of_equal_logits_the_first_counts(native):
    logits, labels = torch.zeros(2, 70), torch.tensor([0, 1])
    assert native.label_logps(logits, labels, None, 1.0)[1].tolist() == [True, False]
    assert label_logps_reference(logits, labels, None, 1.0)[1].tolist() == [True, False]


def test_what_is_not_finite_stays_so(native):
    logits, labels = random(3, 97), torch.tensor([0, 5, 96])
    logits[1, 50] = float("nan")
    logits[2, 7] = float("inf")
    logps = native.label_logps(logits, labels, None, 1.0)[0]
    assert logps[0].isfinite() and not logps[1].isfinite() and not logps[2].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 19, 3000])
def test_native_gradients_equal_the_references(native, size, dtype):
    x, grad = random(5, size, dtype=dtype), random(5, size, dtype=dtype, seed=2)
    weight, gate_up = random(size, dtype=dtype, seed=1), random(5, 2 * size, dtype=dtype, seed=3)
    args = x, weight, grad, 1e-5
    assert_close(native.rms_norm_backward(*args), rms_norm_backward_reference(*args))
    expected = silu_and_mul_backward_reference(gate_up, grad)
    assert_close(native.silu_and_mul_backward(gate_up, grad), expected)
    labels, slopes = torch.tensor([0, size - 1, 7, 18, 3]), random(5, seed=4)
    used = x.clone()
    expected_logps, expected_correct = label_logps_reference(x, labels, slopes, 0.9)
    logps, is_correct = native.label_logps(used, labels, slopes, 0.9)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5)
    assert torch.equal(is_correct, expected_correct)
    assert_close(used, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 64, 70])
def test_products_for_many_tokens_equal_the_references(num_tokens, dtype):
    weights = [quantize_4bit(random(rows, 128, dtype=dtype, seed=rows)) for rows in (48, 19)]
    prepared = [prepare_weight(weight) for weight in weights]
    biases = [None, random(19, dtype=dtype, seed=9)]
    x, grad = random(num_tokens, 128, dtype=dtype), random(num_tokens, 67, dtype=dtype, seed=5)
    expected = nf4_linear_reference(x, weights, biases)
    assert_close(nf4_linear_training(x, prepared, biases), expected)
    assert_close(nf4_linear_backward(grad, prepared), nf4_linear_backward_reference(grad, weights))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_product_is_the_matrix_product_however_the_matrix_lies(dtype):
    x, wide = random(5, 32).to(dtype), random(32, 70).to(dtype)
    for matrix in (wide, wide[:, :24], random(24, 32).to(dtype).t(), wide[:, 1:40:2]):
        expected = (x.float() @ matrix.float()).to(dtype)
        torch.testing.assert_close(product(x, matrix), expected, rtol=1e-2, atol=1e-2)
    assert product(x[:0], wide).shape == (0, 70)


def test_a_wrong_operation_is_found_by_the_self_test():
    library = load("auto") if SETS else pytest.skip("no native kernels")
    training = NativeTraining(library)
    assert failing_training_operations(training, NativeOperations(library)) == []
    training.rms_norm_backward = lambda x, *_: x  # type: ignore[method-assign]
    failing = failing_training_operations(training, NativeOperations(library))
    assert failing == ["rms_norm_backward"]


def test_disagreeing_arguments_are_refused():
    with pytest.raises(ValueError, match=r"grad\.shape: expected \(2, 4\), got \(2, 5\)"):
        rms_norm_backward(torch.ones(2, 4), torch.ones(4), torch.ones(2, 5), 1e-5)
    with pytest.raises(ValueError, match=r"grad\.shape: expected \(2, 4\), got \(2, 8\)"):
        silu_and_mul_backward(torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"labels\.shape: expected \(2,\), got \(3,\)"):
        label_logps(torch.ones(2, 8), torch.ones(3, dtype=torch.int64), None)
