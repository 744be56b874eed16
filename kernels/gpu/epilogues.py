"""The decode kernel with something done to its result before it is stored.

What is saved is a launch and a round trip of the result through memory: it pays where tokens are
few, which is where the decode kernel runs.

The residual leaves the product's bits as they are. With SiLU the tiles hold other rows and their
sums are cut at other columns, so that the last bits may differ from those of the product on its
own: a batch must not choose between the two by what else is in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.gpu import decode
from kernels.nf4 import QuantizedWeight


def accepts_add(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], residual: Tensor
) -> bool:
    """Whether the decode kernel can take these arguments of nf4_linear_add."""
    return residual.device == x.device and decode.accepts(x, weights, biases)


def run_add(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None], residual: Tensor
) -> Tensor:
    """nf4_linear_add for arguments that were accepted."""
    return decode.launch(x, weights, biases, residual=residual)


def accepts_silu(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> bool:
    """Whether the decode kernel can take these arguments of nf4_linear_silu."""
    return decode.accepts(x, weights, biases)


def run_silu(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear_silu for arguments that were accepted."""
    return decode.launch(x, weights, biases, silu=True)
