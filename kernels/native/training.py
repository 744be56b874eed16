"""Operations that only training needs, in the shape that kernels/dispatch.py asks for.

Products expand the weights and leave the rest to the vendor's library: a training pass has many
tokens, whose bits may depend on their number.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.native.arguments import is_plain
from kernels.native.library import DTYPES, quantized_matrix
from kernels.nf4 import QuantizedWeight
from kernels.product import product

MANY_TOKENS = 64
"""From here on it pays to expand the weights."""


class NativeTraining:
    """Training's operations of one loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._expanded = _Expanded()

    def accepts_nf4_linear_training(
        self, x: Tensor, weights: Sequence[QuantizedWeight], *_: object
    ) -> bool:
        """Whether nf4_linear_training can run."""
        return len(x) >= MANY_TOKENS and self.accepts_nf4_linear_backward(x, weights)

    def nf4_linear_training(
        self, x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]
    ) -> Tensor:
        """kernels/nf4_autograd.py's nf4_linear_training."""
        y = product(x, self._expand(weights, x.dtype).t())
        widths = [weight.shape[0] for weight in weights]
        for part, bias in zip(torch.split(y, widths, dim=1), biases, strict=True):
            if bias is not None:
                part += bias
        return y

    def accepts_nf4_linear_backward(self, grad: Tensor, weights: Sequence[QuantizedWeight]) -> bool:
        """Whether nf4_linear_backward can run."""
        return grad.dtype in DTYPES and all(weight.layout == "interleaved" for weight in weights)

    def nf4_linear_backward(self, grad: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
        """kernels/nf4_autograd.py's nf4_linear_backward."""
        return product(grad, self._expand(weights, grad.dtype))

    def accepts_rms_norm_backward(
        self, x: Tensor, weight: Tensor, grad: Tensor, *_: object
    ) -> bool:
        """Whether rms_norm_backward can run."""
        return is_plain(x, weight, grad)

    def rms_norm_backward(self, x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
        """kernels/fused_backward.py's rms_norm_backward."""
        out, size = torch.empty_like(x), x.shape[-1]
        self._library.herd_rms_norm_backward(
            DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), grad.data_ptr(), eps,
            x.numel() // size, size, out.data_ptr(),
        )  # fmt: skip
        return out

    def accepts_silu_and_mul_backward(self, gate_up: Tensor, grad: Tensor) -> bool:
        """Whether silu_and_mul_backward can run."""
        return is_plain(gate_up, grad) and gate_up.dim() == 2

    def silu_and_mul_backward(self, gate_up: Tensor, grad: Tensor) -> Tensor:
        """kernels/fused_backward.py's silu_and_mul_backward."""
        out = torch.empty_like(gate_up)
        self._library.herd_silu_and_mul_backward(
            DTYPES[gate_up.dtype], gate_up.data_ptr(), grad.data_ptr(), *grad.shape, out.data_ptr()
        )
        return out

    def accepts_label_logps(
        self, logits: Tensor, labels: Tensor, slopes: Tensor | None, *_: object
    ) -> bool:
        """Whether label_logps can run."""
        return (
            is_plain(logits)
            and labels.is_contiguous()
            and (slopes is None or slopes.is_contiguous())
        )

    def label_logps(
        self, logits: Tensor, labels: Tensor, slopes: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """kernels/label_logps.py's label_logps."""
        logps = torch.empty(len(logits), dtype=torch.float32)
        is_correct = torch.empty(len(logits), dtype=torch.bool)
        factors = None if slopes is None else slopes / temperature
        self._library.herd_label_logps(
            DTYPES[logits.dtype], logits.data_ptr(), *logits.shape, labels.data_ptr(),
            1 / temperature, None if factors is None else factors.data_ptr(), logps.data_ptr(),
            is_correct.data_ptr(),
        )  # fmt: skip
        return logps, is_correct

    def _expand(self, weights: Sequence[QuantizedWeight], dtype: torch.dtype) -> Tensor:
        """The weights one under another, [sum(out_i), in_features], valid until the next call."""
        widths, in_features = [weight.shape[0] for weight in weights], weights[0].shape[1]
        dense = self._expanded.of_size(sum(widths) * in_features, dtype).view(-1, in_features)
        for rows, weight in zip(torch.split(dense, widths), weights, strict=True):
            matrix = quantized_matrix(weight, None)
            self._library.herd_dequantize(DTYPES[dtype], ctypes.byref(matrix), rows.data_ptr())
        return dense


class _Expanded(threading.local):
    """Memory for expanded weights, kept: fresh pages would cost more than the expansion."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of_size(self, numel: int, dtype: torch.dtype) -> Tensor:
        """dtype [numel]."""
        num_bytes = numel * dtype.itemsize
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[:num_bytes].view(dtype)
