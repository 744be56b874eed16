"""One small random case per kernel, against the operation's reference, on the device itself.

Each returns None or what is wrong; `run` and `accepts` take the operation's arguments. An
implementation that would decline everything on this device fails too, as not made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.fused import silu_and_mul_reference
from kernels.lora import LoraSlice, add_lora_reference
from kernels.nf4 import (
    QuantizedWeight,
    dequantize_4bit_reference,
    quantize_4bit,
    quantize_groups_reference,
)
from kernels.nf4_autograd import nf4_linear_backward_reference
from kernels.nf4_linear import nf4_linear_reference

TOLERANCE = 2e-2
"""Of 16-bit results against float32, relative to the largest of them."""
IN_FEATURES = 512

Run = Callable[..., Any]
Accepts = Callable[..., bool]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(*widths: int) -> list[QuantizedWeight]:
    """Weights of so many rows, on the CPU, with and without a group of zeros."""
    dense = [random(width, IN_FEATURES, seed=width) * 0.05 for width in widths]
    dense[0][0, :64] = 0
    return [quantize_4bit(weight) for weight in dense]


def compare(actual: Tensor, expected: Tensor) -> str | None:
    """None, or by how much they differ."""
    worst = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
    limit = TOLERANCE * expected.abs().max().item()
    return None if worst <= limit else f"results are {worst:.3g} off, {limit:.3g} is allowed"


def _linear(
    run: Run, accepts: Accepts, device: torch.device, num_tokens: int, widths: tuple[int, ...]
) -> str | None:
    weights = _weights(*widths)
    biases = [random(width, seed=width + 1).bfloat16() for width in widths]
    x = random(num_tokens, IN_FEATURES, seed=1).bfloat16()
    expected = nf4_linear_reference(x.float(), weights, [bias.float() for bias in biases])
    arguments = x.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases]
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)


def linear(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The decode kernel: each number of tokens per pass, three slices of odd heights."""
    sizes = (1, 11, 37)
    problems = (_linear(run, accepts, device, size, (160, 40, 33)) for size in sizes)
    return next((problem for problem in problems if problem), None)


def linear_few(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The portable kernel."""
    return _linear(run, accepts, device, 3, (33, 8))


def linear_many(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """Dequantise and multiply."""
    return _linear(run, accepts, device, 70, (33, 8))


def plain(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The 16-bit product."""
    x, weight = random(70, 96, seed=1).bfloat16(), random(24, 96, seed=2).bfloat16()
    arguments = x.to(device), weight.to(device), None
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), x.float() @ weight.float().T)


def add(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The product and the residual."""
    weights, x = _weights(72), random(3, IN_FEATURES, seed=1).bfloat16()
    residual = random(3, 72, seed=2).bfloat16()
    expected = residual.float() + nf4_linear_reference(x.float(), weights, [None])
    arguments = x.to(device), [w.to(device) for w in weights], [None], residual.to(device)
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)


def silu(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """SiLU of the gate times the up."""
    weights, x = _weights(72, 72), random(3, IN_FEATURES, seed=1).bfloat16()
    expected = silu_and_mul_reference(nf4_linear_reference(x.float(), weights, [None, None]))
    arguments = x.to(device), [w.to(device) for w in weights], [None, None]
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)


def backward(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """The gradient of x."""
    weights, grad = _weights(33, 8), random(5, 41, seed=1).bfloat16()
    expected = nf4_linear_backward_reference(grad.float(), weights)
    arguments = grad.to(device), [w.to(device) for w in weights]
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)


def dequantize(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """To the bit, in float32."""
    weight = _weights(33)[0]
    expected = dequantize_4bit_reference(weight, torch.float32)
    if not accepts(weight.to(device), torch.float32):
        return "not made for this device"
    actual = run(weight.to(device), torch.float32).cpu()
    return None if torch.equal(actual, expected) else "bits differ from the reference's"


def quantize(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """To the bit, the last group partial."""
    weight = random(33, 70, seed=1)
    if not accepts(weight.to(device), "nf4", 64):
        return "not made for this device"
    pairs = zip(
        run(weight.to(device), "nf4", 64), quantize_groups_reference(weight, "nf4", 64), strict=True
    )
    same = all(torch.equal(actual.cpu(), expected) for actual, expected in pairs)
    return None if same else "bits differ from the reference's"


def lora(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """Two slices, three adapters of different ranks, one of which leaves a slice alone."""
    x, y = random(5, 96, seed=1).bfloat16(), random(5, 40, seed=2).bfloat16()
    indices, scales = torch.tensor([0, -1, 2, 1, 2]).int(), torch.tensor([1.0, 1, 0.5, 1, 2])

    def slices(device: torch.device, dtype: torch.dtype) -> list[LoraSlice]:
        def pair(rank: int, width: int) -> tuple[Tensor, Tensor]:
            a, b = random(rank, 96, seed=rank) * 0.1, random(width, rank, seed=width)
            return a.bfloat16().to(device, dtype), b.bfloat16().to(device, dtype)

        return [
            LoraSlice(0, 32, [pair(8, 32), pair(16, 32), pair(3, 32)]),
            LoraSlice(32, 40, [None, pair(16, 8), pair(64, 8)]),
        ]

    expected = y.float()
    add_lora_reference(
        expected, x.float(), slices(torch.device("cpu"), torch.float32), indices, scales
    )
    kept = slices(device, torch.bfloat16)
    actual = y.to(device)
    arguments = actual, x.to(device), kept, indices.to(device), scales.to(device)
    if not accepts(*arguments):
        return "not made for this device"
    run(*arguments)
    return compare(actual, expected)
