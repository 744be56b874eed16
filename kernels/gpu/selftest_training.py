"""One small random case per kernel that only training needs; see selftest.py for the form."""

from __future__ import annotations

import torch

from kernels.fused_backward import rms_norm_backward_reference, silu_and_mul_backward_reference
from kernels.gpu.selftest import Accepts, Run, compare, random


def rms_norm_backward(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """An odd size."""
    x, grad = (random(3, 200, seed=seed).bfloat16() for seed in (1, 2))
    weight = random(200, seed=3).bfloat16()
    expected = rms_norm_backward_reference(x.float(), weight.float(), grad.float(), 1e-5)
    arguments = x.to(device), weight.to(device), grad.to(device), 1e-5
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)


def silu_and_mul_backward(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """An odd size."""
    gate_up, grad = random(3, 150, seed=1).bfloat16(), random(3, 75, seed=2).bfloat16()
    expected = silu_and_mul_backward_reference(gate_up.float(), grad.float())
    arguments = gate_up.to(device), grad.to(device)
    if not accepts(*arguments):
        return "not made for this device"
    return compare(run(*arguments), expected)
