"""x M for many rows at once, by the library that is fastest here; the training pass lives of it.

Unlike kernels/linear.py's, a row's last bits may depend on how many others there are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.dispatch import reference_only


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows with a matrix.

    Args:
        x:      float32, bfloat16 or float16 [num_rows, k].
        matrix: x's dtype [k, n]; best a transposed view, or contiguous.

    Returns:
        x's dtype [num_rows, n].
    """
    if x.device.type != "cpu" or reference_only():
        return x @ matrix
    if x.dtype == torch.float32:
        # On AMD's processors PyTorch's float32 product, which is MKL's, runs at half their speed.
        # A matrix that is part of a larger one would take oneDNN a thousand times as long.
        is_whole = matrix.is_contiguous() or matrix.t().is_contiguous()
        return _onednn_product(x, matrix) if is_whole and _has_onednn() else x @ matrix
    if x.dtype == torch.bfloat16 and _has_onednn() and _has_bfloat16():
        return x @ matrix
    # Without instructions for a half type, PyTorch multiplies it element by element.
    return product(x.float(), matrix.float()).to(x.dtype)


def _onednn_product(x: Tensor, matrix: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix.t(), None, "none", [], "")
    return result


@cache
def _has_onednn() -> bool:
    """Whether the operator is there, which torch.compile's code calls, and multiplies."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, matrix = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(4, 2)
    try:
        return torch.equal(_onednn_product(x, matrix), x @ matrix)
    except (AttributeError, RuntimeError, TypeError):
        return False


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
