"""Which tensors the library can read, and adapters as it reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.lora import LoraSlice
from kernels.native import library as native
from kernels.native.library import DTYPES

HEAD_MULTIPLE = 16
"""Attention takes heads in whole vectors, and the longest has 16 lanes."""


def is_plain(*tensors: Tensor) -> bool:
    """Contiguous, on the CPU, of one dtype that the library knows."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(
        tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )


def has_whole_rows(x: Tensor) -> bool:
    """[num_tokens, num_heads, head_dim], each token's heads in one piece, on the CPU."""
    return (
        x.dtype in DTYPES
        and x.device.type == "cpu"
        and x.stride(2) == 1
        and x.stride(1) == x.shape[2]
    )


def is_index(tensor: Tensor) -> bool:
    """Contiguous int32."""
    return tensor.dtype == torch.int32 and tensor.is_contiguous()


def can_add(part: LoraSlice, dtype: torch.dtype) -> bool:
    """Whether a slice's matrices are as the library reads them."""
    return all(
        row is None or (is_plain(row[0], row[1].t()) and row[0].dtype == dtype) for row in part.rows
    )


def lora_slices(
    slices: Sequence[LoraSlice],
) -> tuple[ctypes.Array[native.LoraSlice], list[ctypes.Array[native.LoraPair]]]:
    """Describe slices to the library: (LoraSlice array, the arrays that it points into)."""
    tables = []
    for part in slices:
        pairs = (native.LoraPair * len(part.rows))()
        for pair, row in zip(pairs, part.rows, strict=True):
            if row is not None:
                pair.a, pair.b, pair.rank = row[0].data_ptr(), row[1].data_ptr(), len(row[0])
        tables.append(pairs)
    described = [
        native.LoraSlice(ctypes.addressof(pairs), part.start, part.stop)
        for part, pairs in zip(slices, tables, strict=True)
    ]
    return (native.LoraSlice * len(slices))(*described), tables
