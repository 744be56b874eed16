"""The output head in fewer bits than it is stored in: --lm-head-dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.memory import quantized_bytes
from engine.model_config import ModelSpec
from engine.tensor_plan import HEAD
from kernels.int8_linear import Int8Weight, dequantize_int8, quantize_int8
from kernels.nf4 import QuantizedWeight, dequantize_4bit, quantize_4bit

HeadDtype = Literal["auto", "int8", "nf4"]
Weight = QuantizedWeight | Int8Weight | Tensor


def check_head(head_dtype: HeadDtype, stored_types: Mapping[str, str]) -> HeadDtype:
    """What is to be done with the head: auto where there is nothing to do.

    Args:
        head_dtype: as asked for.
        stored_types: nf4 or fp4 by name, of the checkpoint's 4-bit weights.

    Raises:
        CheckpointError: the checkpoint's head is 4-bit and would have to be converted.
    """
    stored = stored_types.get(HEAD)
    if stored is None or head_dtype == "auto":
        return head_dtype
    if stored != head_dtype:
        raise CheckpointError(
            f"--lm-head-dtype {head_dtype} was asked for, but this checkpoint's head is {stored} "
            f"already; converting would lose accuracy twice. Use --lm-head-dtype auto."
        )
    return "auto"


def quantize_head(weight: Tensor, head_dtype: HeadDtype) -> Weight:
    """The head as it is to be held.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if head_dtype == "auto":
        return weight
    try:
        return quantize_int8(weight) if head_dtype == "int8" else quantize_4bit(weight)
    except ValueError as error:
        raise CheckpointError(
            f"The output head cannot be held in {head_dtype}: {error}. The checkpoint is damaged; "
            f"download it again, or use --lm-head-dtype auto."
        ) from error


def extra_head_bytes(spec: ModelSpec, dtype: torch.dtype, head_dtype: HeadDtype) -> int:
    """What the head's own type adds to the weights' memory; negative where it saves some.

    A tied head costs nothing as long as it is the embedding, and its whole size afterwards.
    """
    if head_dtype == "auto":
        return 0
    rows, columns = spec.embedding_shape
    numel = rows * columns
    held = numel + 4 * rows if head_dtype == "int8" else quantized_bytes(numel)
    return held if spec.tie_word_embeddings else held - numel * dtype.itemsize


def dense_weight(weight: Weight) -> Tensor:
    """The matrix [out_features, in_features], dequantised where it is not dense."""
    if isinstance(weight, QuantizedWeight):
        return dequantize_4bit(weight)
    return dequantize_int8(weight) if isinstance(weight, Int8Weight) else weight


def is_copy_of(copy: Tensor, weight: Weight) -> bool:
    """Whether a dense matrix is this weight, or what this weight was quantised from."""
    dense = dense_weight(weight)
    copy = copy.to(dense.device, dense.dtype)
    if torch.equal(copy, dense):
        return True
    if isinstance(weight, Tensor) or not bool(copy.isfinite().all()):
        return False
    again: Weight
    if isinstance(weight, Int8Weight):
        again = quantize_int8(copy)
    else:
        again = quantize_4bit(
            copy,
            quant_type=weight.quant_type,
            group_size=weight.group_size,
            double_quant=weight.nested_absmax is not None,
        )
    return torch.equal(dense_weight(again), dense)
