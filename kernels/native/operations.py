"""Operations of the native library in the shape that kernels/dispatch.py asks for.

Each pair accepts or declines what the operation's own file has checked, then runs it. Taken are
float32 and bfloat16 on the CPU and contiguous weights; anything else is the reference's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.int8_linear import Int8Weight
from kernels.layout import BLOCK, Layout
from kernels.native.library import (
    DTYPES,
    Arena,
    Matrix,
    dense_matrix,
    int8_matrix,
    quantized_matrix,
)
from kernels.nf4 import QuantizedWeight


class NativeOperations:
    """The operations of one loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._arena = Arena()

    # Layout and codec.

    def accepts_relayout(self, packed: Tensor, *_: object) -> bool:
        """Whether relayout can run."""
        return packed.device.type == "cpu" and packed.is_contiguous()

    def relayout(self, packed: Tensor, shape: tuple[int, int], layout: Layout) -> Tensor:
        """kernels/layout.py's relayout."""
        is_back = layout == "stock"
        out = torch.empty_like(packed) if is_back else self._arena.allocate(len(packed))
        self._library.herd_relayout(
            packed.data_ptr(), out.data_ptr(), shape[0], shape[1] // 2, is_back
        )
        return out

    def accepts_prepare_weight(self, weight: QuantizedWeight) -> bool:
        """Whether the interleaved layout can hold the weight: no group may span rows."""
        return (
            weight.device.type == "cpu"
            and weight.group_size % BLOCK == 0
            and weight.shape[1] % weight.group_size == 0
        )

    def prepare_weight(self, weight: QuantizedWeight) -> QuantizedWeight:
        """kernels/nf4_linear.py's prepare_weight."""
        return weight.in_layout("interleaved")

    def accepts_dequantize_4bit(self, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """Whether dequantize_4bit can run."""
        return weight.layout == "interleaved" and dtype in DTYPES

    def dequantize_4bit(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """kernels/nf4.py's dequantize_4bit."""
        out = torch.empty(weight.shape, dtype=dtype)
        matrix = quantized_matrix(weight, None)
        self._library.herd_dequantize(DTYPES[dtype], ctypes.byref(matrix), out.data_ptr())
        return out

    # Projections.

    def accepts_nf4_linear(self, x: Tensor, weights: Sequence[QuantizedWeight], *_: object) -> bool:
        """Whether nf4_linear can run."""
        return x.dtype in DTYPES and all(weight.layout == "interleaved" for weight in weights)

    def nf4_linear(
        self, x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
    ) -> Tensor:
        """kernels/nf4_linear.py's nf4_linear."""
        matrices = [
            quantized_matrix(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        ]
        return self._linear(x, matrices, sum(weight.shape[0] for weight in weights))

    def accepts_linear(self, x: Tensor, weight: Tensor, *_: object) -> bool:
        """Whether linear can run."""
        return (
            x.dtype in DTYPES
            and x.device.type == "cpu"
            and x.shape[1] % BLOCK == 0
            and weight.is_contiguous()
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """kernels/linear.py's linear."""
        return self._linear(x, [dense_matrix(weight, bias)], weight.shape[0])

    def accepts_int8_linear(self, x: Tensor, weight: Int8Weight, *_: object) -> bool:
        """Whether int8_linear can run."""
        return self.accepts_linear(x, weight.codes)

    def int8_linear(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        """kernels/int8_linear.py's int8_linear."""
        return self._linear(x, [int8_matrix(weight, bias)], weight.shape[0])

    def _linear(self, x: Tensor, matrices: list[Matrix], width: int) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(len(x), width)
        array = (Matrix * len(matrices))(*matrices)
        self._library.herd_linear(
            DTYPES[x.dtype], array, len(matrices), x.data_ptr(), len(x), y.data_ptr(), width
        )
        return y
