"""kernels/native/self_test.py for the operations that only training needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import fused_backward, label_logps, nf4, nf4_autograd, nf4_linear
from kernels.native.self_test import failing_cases, is_close, random_values

if TYPE_CHECKING:
    from kernels.native.operations import NativeOperations
    from kernels.native.training import NativeTraining


def failing_training_operations(native: NativeTraining, operations: NativeOperations) -> list[str]:
    """Names of the operations that do not agree with their references."""
    return failing_cases(
        {
            "nf4_linear_training": lambda generator: _training(native, operations, generator),
            "nf4_linear_backward": lambda generator: _backward(native, operations, generator),
            "rms_norm_backward": lambda generator: _rms_norm_backward(native, generator),
            "silu_and_mul_backward": lambda generator: _silu_and_mul_backward(native, generator),
            "label_logps": lambda generator: _label_logps(native, generator),
        }
    )


def _training(
    native: NativeTraining, operations: NativeOperations, generator: torch.Generator
) -> bool:
    weights = [nf4.quantize_4bit(random_values(generator, rows, 128)) for rows in (19, 8)]
    x, biases = random_values(generator, 5, 128), [random_values(generator, 19), None]
    prepared = [operations.prepare_weight(weight) for weight in weights]
    expected = nf4_linear.nf4_linear_reference(x, weights, biases)
    return is_close(native.nf4_linear_training(x, prepared, biases), expected)


def _backward(
    native: NativeTraining, operations: NativeOperations, generator: torch.Generator
) -> bool:
    weights = [nf4.quantize_4bit(random_values(generator, rows, 128)) for rows in (19, 8)]
    grad = random_values(generator, 5, 27)
    prepared = [operations.prepare_weight(weight) for weight in weights]
    expected = nf4_autograd.nf4_linear_backward_reference(grad, weights)
    return is_close(native.nf4_linear_backward(grad, prepared), expected)


def _rms_norm_backward(native: NativeTraining, generator: torch.Generator) -> bool:
    args = (
        random_values(generator, 3, 72),
        random_values(generator, 72),
        random_values(generator, 3, 72),
        1e-5,
    )
    expected = fused_backward.rms_norm_backward_reference(*args)
    return is_close(native.rms_norm_backward(*args), expected)


def _silu_and_mul_backward(native: NativeTraining, generator: torch.Generator) -> bool:
    args = random_values(generator, 3, 144), random_values(generator, 3, 72)
    expected = fused_backward.silu_and_mul_backward_reference(*args)
    return is_close(native.silu_and_mul_backward(*args), expected)


def _label_logps(native: NativeTraining, generator: torch.Generator) -> bool:
    logits, labels = random_values(generator, 3, 97), torch.tensor([0, 96, 40])
    slopes, expected_grad = torch.tensor([1.0, -2.0, 0.5]), logits.clone()
    expected = label_logps.label_logps_reference(expected_grad, labels, slopes, 0.7)
    actual = native.label_logps(logits, labels, slopes, 0.7)
    return (
        is_close(actual[0], expected[0])
        and torch.equal(actual[1], expected[1])
        and is_close(logits, expected_grad)
    )
