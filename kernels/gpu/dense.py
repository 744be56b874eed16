"""Many tokens: the weights are expanded into one reused buffer and the vendor's library multiplies.

The same buffer, as it is, is the right operand of the backward product: nothing is transposed.
Results of this path depend on how many tokens there are, in the last bits, as the library's do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import batch_invariant
from kernels.gpu import device as gpu
from kernels.gpu.codec import dequantize_into
from kernels.nf4 import QuantizedWeight

MANY_TOKENS = 64
"""Up to here a token of a 16-bit product has the same bits in any batch, as of a 4-bit one."""


def accepts(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> bool:
    """Whether these arguments of nf4_linear are on a device that Triton works on.

    Declined where the batch must not show: the library chooses its sums by the number of tokens.
    """
    return not batch_invariant() and gpu.runs_here(x, *(w.packed for w in weights), *biases)


def run(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor:
    """nf4_linear for arguments that were accepted."""
    widths = [weight.shape[0] for weight in weights]
    y = functional.linear(x, expand(weights, x.dtype))
    for part, bias in zip(torch.split(y, widths, dim=1), biases, strict=True):
        if bias is not None:
            part += bias
    return y


def accepts_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:  # noqa: ARG001
    """Whether the dense product of so many tokens may be one call of the library's."""
    return not batch_invariant() and len(x) > MANY_TOKENS and gpu.runs_here(x, weight)


def run_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operation linear, for arguments that were accepted."""
    return functional.linear(x, weight, bias)


def accepts_backward(grad: Tensor, weights: Sequence[QuantizedWeight]) -> bool:
    """Whether these arguments of nf4_linear_backward are on a device that Triton works on."""
    return gpu.runs_here(grad, *(w.packed for w in weights))


def run_backward(grad: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
    """nf4_linear_backward for arguments that were accepted."""
    return grad @ expand(weights, grad.dtype)


def expand(weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> Tensor:
    """The weights one under another, [sum(out_i), in_features], in the scratch buffer."""
    row_size = weights[0].shape[1]
    numel = sum(weight.numel for weight in weights)
    dense = gpu.scratch(weights[0].device, dtype, numel).view(-1, row_size)
    start = 0
    for weight in weights:
        dequantize_into(dense[start : start + weight.shape[0]], weight)
        start += weight.shape[0]
    return dense
