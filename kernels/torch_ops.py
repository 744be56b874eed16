"""nf4_linear as an operator of PyTorch's, so that torch.compile takes it whole.

herd::nf4_linear and herd::nf4_linear_backward take the fields of the weights as lists, because an
operator's arguments are tensors and numbers. Outside torch.compile nothing goes through here: an
operator's call costs microseconds that a decode step would feel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kernels.codebooks import QuantType
from kernels.nf4 import QuantizedWeight
from kernels.nf4_autograd import nf4_linear_backward
from kernels.nf4_linear import nf4_linear


@torch.library.custom_op("herd::nf4_linear", mutates_args=())
def _nf4_linear(
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_offset: list[Tensor],
    biases: list[Tensor | None],
    widths: list[int],
    quant_type: str,
    group_size: int,
) -> Tensor:
    weights = _weights(
        packed, absmax, nested_absmax, nested_offset, widths, quant_type, group_size, x.shape[1],
        x.dtype,
    )  # fmt: skip
    return nf4_linear(x, weights, biases)


@_nf4_linear.register_fake
def _(
    x: Tensor,
    packed: Any,  # noqa: ARG001
    absmax: Any,  # noqa: ARG001
    nested_absmax: Any,  # noqa: ARG001
    nested_offset: Any,  # noqa: ARG001
    biases: Any,  # noqa: ARG001
    widths: list[int],
    quant_type: str,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], sum(widths))


@torch.library.custom_op("herd::nf4_linear_backward", mutates_args=())
def _nf4_linear_backward(
    grad: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_offset: list[Tensor],
    widths: list[int],
    quant_type: str,
    group_size: int,
    in_features: int,
) -> Tensor:
    weights = _weights(
        packed, absmax, nested_absmax, nested_offset, widths, quant_type, group_size, in_features,
        grad.dtype,
    )  # fmt: skip
    return nf4_linear_backward(grad, weights)


@_nf4_linear_backward.register_fake
def _(
    grad: Tensor,
    packed: Any,  # noqa: ARG001
    absmax: Any,  # noqa: ARG001
    nested_absmax: Any,  # noqa: ARG001
    nested_offset: Any,  # noqa: ARG001
    widths: Any,  # noqa: ARG001
    quant_type: str,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    in_features: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, packed, absmax, nested_absmax, nested_offset, _, widths, quant_type, group_size = inputs
    # Frozen weights outlive the graph: kept as they are, not saved for backward.
    ctx.weights = packed, absmax, nested_absmax, nested_offset, widths, quant_type, group_size
    ctx.in_features = x.shape[1]
    ctx.counts = [len(tensors) for tensors in inputs[1:5]]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """A gradient for each argument: x's, and none for the weights, list by list."""
    of_x = _nf4_linear_backward(grad.contiguous(), *ctx.weights, ctx.in_features)
    return of_x, *([None] * count for count in ctx.counts), None, None, None, None


_nf4_linear.register_autograd(_gradient, setup_context=_keep)


def traced_nf4_linear(
    x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
) -> Tensor:
    """nf4_linear by way of the operator. All weights are of one type and group size.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    weights = [weight.in_layout("stock") for weight in weights]
    nested = [weight.nested_absmax for weight in weights if weight.nested_absmax is not None]
    offsets = [weight.nested_offset for weight in weights if weight.nested_offset is not None]
    result: Tensor = _nf4_linear(
        x, [w.packed for w in weights], [w.absmax for w in weights], nested, offsets, list(biases),
        [w.shape[0] for w in weights], weights[0].quant_type, weights[0].group_size,
    )  # fmt: skip
    return result


def _weights(
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    nested_offset: Sequence[Tensor],
    widths: Sequence[int],
    quant_type: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> list[QuantizedWeight]:
    """Weights from their fields; without double quantisation the nested lists are empty."""
    return [
        QuantizedWeight(
            packed=packed[i], absmax=absmax[i],
            nested_absmax=nested_absmax[i] if nested_absmax else None,
            nested_offset=nested_offset[i] if nested_offset else None,
            shape=(widths[i], in_features), dtype=dtype,
            quant_type=cast(QuantType, quant_type), group_size=group_size,
        )
        for i in range(len(packed))
    ]  # fmt: skip
