"""Gradients of the norm and of SiLU·up equal the references', in Triton's interpreter too."""

import pytest
import torch

from kernels.fused_backward import rms_norm_backward_reference, silu_and_mul_backward_reference
from kernels.gpu import rows_backward, selftest_training

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Sums have another order; the interpreter truncates to bfloat16.
NOISE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.cpu().double() - expected.double()).abs().max()
    assert error <= NOISE[dtype] * expected.double().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (2, 3, 1030)])
def test_the_norms_gradient(dtype, shape, device):
    x, grad = (randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    weight = randn(shape[-1], seed=3, dtype=dtype)
    arguments = x.to(device), weight.to(device), grad.to(device), 1e-5
    assert rows_backward.accepts_rms_norm_backward(*arguments)
    actual = rows_backward.rms_norm_backward(*arguments)
    assert_near(actual, rms_norm_backward_reference(x, weight, grad, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 1000, 1025])
def test_silu_times_ups_gradient(dtype, size, device):
    gate_up, grad = randn(3, 2 * size, dtype=dtype), randn(3, size, seed=1, dtype=dtype)
    arguments = gate_up.to(device), grad.to(device)
    assert rows_backward.accepts_silu_and_mul_backward(*arguments)
    actual = rows_backward.silu_and_mul_backward(*arguments)
    assert_near(actual, silu_and_mul_backward_reference(gate_up, grad), dtype)


def test_slices_and_empty_batches(device):
    wide = torch.ones(2, 16, device=device)
    assert not rows_backward.accepts_silu_and_mul_backward(wide[:, :8], wide[:, :4])
    empty, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert rows_backward.rms_norm_backward(empty, weight, empty, 1e-5).shape == (0, 8)
    assert rows_backward.silu_and_mul_backward(empty, empty[:, :4]).shape == (0, 8)


@pytest.mark.parametrize("name", ["rms_norm_backward", "silu_and_mul_backward"])
def test_the_self_test_passes_and_finds_what_is_wrong(name, device):
    run, accepts = getattr(rows_backward, name), getattr(rows_backward, f"accepts_{name}")
    test = getattr(selftest_training, name)
    assert test(run, accepts, device) is None
    assert "allowed" in test(lambda x, *_: 2 * x, accepts, device)
