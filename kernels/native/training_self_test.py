"""kernels/native/self_test.py for the operations that only training needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import fused_backward, label_logps, nf4, nf4_autograd, nf4_linear

if TYPE_CHECKING:
    from kernels.native.operations import NativeOperations
    from kernels.native.training import NativeTraining

DTYPE = torch.bfloat16
NOISE = 2**-6
"""Two bfloat16 roundings, of the largest value."""


def failing_training_operations(native: NativeTraining, operations: NativeOperations) -> list[str]:
    """Names of the operations that do not agree with their references."""
    cases: dict[str, Callable[[torch.Generator], bool]] = {
        "nf4_linear_training": lambda generator: _training(native, operations, generator),
        "nf4_linear_backward": lambda generator: _backward(native, operations, generator),
        "rms_norm_backward": lambda generator: _rms_norm_backward(native, generator),
        "silu_and_mul_backward": lambda generator: _silu_and_mul_backward(native, generator),
        "label_logps": lambda generator: _label_logps(native, generator),
    }
    failing = []
    for name, agrees in cases.items():
        try:
            is_right = agrees(torch.Generator().manual_seed(0))
        except Exception:  # whatever it is, the reference is still there
            is_right = False
        if not is_right:
            failing.append(name)
    return failing


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(DTYPE)


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    difference = (actual.float() - expected.float()).abs().max()
    return bool(difference <= NOISE * expected.float().abs().max())


def _training(
    native: NativeTraining, operations: NativeOperations, generator: torch.Generator
) -> bool:
    weights = [nf4.quantize_4bit(_random(generator, rows, 128)) for rows in (19, 8)]
    x, biases = _random(generator, 5, 128), [_random(generator, 19), None]
    prepared = [operations.prepare_weight(weight) for weight in weights]
    expected = nf4_linear.nf4_linear_reference(x, weights, biases)
    return _is_close(native.nf4_linear_training(x, prepared, biases), expected)


def _backward(
    native: NativeTraining, operations: NativeOperations, generator: torch.Generator
) -> bool:
    weights = [nf4.quantize_4bit(_random(generator, rows, 128)) for rows in (19, 8)]
    grad = _random(generator, 5, 27)
    prepared = [operations.prepare_weight(weight) for weight in weights]
    expected = nf4_autograd.nf4_linear_backward_reference(grad, weights)
    return _is_close(native.nf4_linear_backward(grad, prepared), expected)


def _rms_norm_backward(native: NativeTraining, generator: torch.Generator) -> bool:
    args = _random(generator, 3, 72), _random(generator, 72), _random(generator, 3, 72), 1e-5
    expected = fused_backward.rms_norm_backward_reference(*args)
    return _is_close(native.rms_norm_backward(*args), expected)


def _silu_and_mul_backward(native: NativeTraining, generator: torch.Generator) -> bool:
    args = _random(generator, 3, 144), _random(generator, 3, 72)
    expected = fused_backward.silu_and_mul_backward_reference(*args)
    return _is_close(native.silu_and_mul_backward(*args), expected)


def _label_logps(native: NativeTraining, generator: torch.Generator) -> bool:
    logits, labels = _random(generator, 3, 97), torch.tensor([0, 96, 40])
    slopes, expected_grad = torch.tensor([1.0, -2.0, 0.5]), logits.clone()
    expected = label_logps.label_logps_reference(expected_grad, labels, slopes, 0.7)
    actual = native.label_logps(logits, labels, slopes, 0.7)
    return (
        _is_close(actual[0], expected[0])
        and torch.equal(actual[1], expected[1])
        and _is_close(logits, expected_grad)
    )
