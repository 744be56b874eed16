"""The compiled library as Python sees it: loaded once, called with addresses and sizes.

Nothing is checked here: kernels/native/operations.py accepts arguments first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import torch
from torch import Tensor

from kernels.codebooks import DYNAMIC_MAP, codebook
from kernels.int8_linear import Int8Weight
from kernels.native.build import build
from kernels.nf4 import QuantizedWeight
from kernels.threads import follow_num_threads

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""api.h's Dtype."""
ARENA_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "choose": (ctypes.c_char_p, _P),
    "set_num_threads": (_I,),
    "free_scratch": (),
    "relayout": (_P, _P, _L, _L, _I),
    "linear": (_I, _P, _I, _P, _L, _P, _L),
    "dequantize": (_I, _P, _P),
    "rms_norm": (_I, _P, _P, _F, _L, _L, _P),
    "add_rms_norm": (_I, _P, _P, _P, _F, _L, _L, _P, _P),
    "rotate": (_I, _P, _L, _P, _P, _L, _L, _L, _P),
    "silu_and_mul": (_I, _P, _L, _L, _P),
    "write_kv": (_I, _P, _P, _L, _L, _P, _P, _P, _L, _L),
    "attention": (_I, _P),
    "add_lora": (_I, _P, _L, _P, _L, _L, _P, _L, _P),
    "rms_norm_backward": (_I, _P, _P, _P, _F, _L, _L, _P),
    "silu_and_mul_backward": (_I, _P, _P, _L, _L, _P),
    "label_logps": (_I, _P, _L, _L, _P, _F, _P, _P, _P),
    "decode": (_P, _P),
    "nucleus_floors": (_P, _L, _L, _P, _P, _P),
    "read": (_P, _L),
}
"""Arguments of the library's functions, herd_<name> each."""


class Matrix(ctypes.Structure):
    """api.h's Matrix: one slice of a fused projection. It holds addresses, not references."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("nested_offset", ctypes.c_float),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("int8_activations", ctypes.c_int32),
    )


class LoraPair(ctypes.Structure):
    """api.h's LoraPair."""

    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64))


class LoraSlice(ctypes.Structure):
    """api.h's LoraSlice."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
    )


class LoraTokens(ctypes.Structure):
    """api.h's LoraTokens."""

    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
    )


class Attention(ctypes.Structure):
    """api.h's Attention."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "out")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "cu_seqlens_q")),
        *((name, ctypes.c_int64) for name in ("q_stride", "out_stride", "table_stride")),
        *((name, ctypes.c_int64) for name in ("num_seqs", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "block_size", "sliding_window")),
        ("scale", ctypes.c_float),
    )


class Projection(ctypes.Structure):
    """api.h's Projection."""

    _fields_ = (("slices", ctypes.c_void_p), ("num_slices", ctypes.c_int64))


class Layer(ctypes.Structure):
    """api.h's Layer."""

    _fields_ = (
        *((name, Projection) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("sliding_window", ctypes.c_int64),
    )


class Decoder(ctypes.Structure):
    """api.h's Decoder."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "num_layers", "hidden_size")),
        *((name, ctypes.c_int64) for name in ("intermediate_size", "num_heads")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Step(ctypes.Structure):
    """api.h's Step."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "cos", "sin", "slot_mapping")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens", "cu_seqlens_q")),
        *((name, ctypes.c_void_p) for name in ("caches", "adapters", "num_adapted")),
        ("tokens", LoraTokens),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_seqs")),
        *((name, ctypes.c_int64) for name in ("table_stride", "block_size")),
    )


def quantized_matrix(weight: QuantizedWeight, bias: Tensor | None) -> Matrix:
    """Describe a 4-bit weight in the interleaved layout."""
    has_codes = weight.nested_absmax is not None
    scales = weight.nested_absmax if has_codes else weight.absmax
    assert scales is not None
    return Matrix(
        weight.packed.data_ptr(),
        weight.absmax.data_ptr() if has_codes else None,
        scales.data_ptr(),
        codebook(weight.quant_type).data_ptr(),
        None if bias is None else bias.data_ptr(),
        0.0 if weight.nested_offset is None else float(weight.nested_offset),
        *weight.shape,
        weight.group_size,
        weight.int8_activations,
    )


def dense_matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """Describe a dense, contiguous weight [out_features, in_features]."""
    bias_address = None if bias is None else bias.data_ptr()
    return Matrix(weight.data_ptr(), None, None, None, bias_address, 0.0, *weight.shape, 0)


def int8_matrix(weight: Int8Weight, bias: Tensor | None) -> Matrix:
    """Describe an 8-bit weight."""
    scales, bias_address = weight.scales.data_ptr(), None if bias is None else bias.data_ptr()
    return Matrix(weight.codes.data_ptr(), None, scales, None, bias_address, 0.0, *weight.shape, 0)


def load(instruction_set: str) -> ctypes.CDLL:
    """Build the library where needed and load it.

    Args:
        instruction_set: auto for the best that this machine has, or one by name.

    Raises:
        BuildError: it is not there and cannot be compiled.
        OSError: it cannot be loaded.
        ValueError: there is no such instruction set, or this machine has it not.
    """
    library = ctypes.CDLL(str(build()))
    library.herd_instruction_sets.restype = ctypes.c_char_p
    for name, arguments in SIGNATURES.items():
        function = getattr(library, f"herd_{name}")
        function.argtypes, function.restype = arguments, None
    library.herd_choose.restype = library.herd_has_int8_activations.restype = ctypes.c_int
    sets = library.herd_instruction_sets().decode().split()
    chosen = sets[0] if instruction_set == "auto" else instruction_set
    if not library.herd_choose(chosen.encode(), DYNAMIC_MAP.data_ptr()):
        raise ValueError(f"HERD_NATIVE_ISA: expected auto, none or one of {sets}, got {chosen!r}")
    follow_num_threads(library.herd_set_num_threads)
    return library


class Arena:
    """Memory for weights in huge pages, which spare a stream of reads most address look-ups.

    Handed out piece by piece from large blocks; a block is freed with its last tensor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], aligned to 64 bytes."""
        size = -(-num_bytes // 64) * 64
        with self._lock:
            if self._used + size > len(self._block):
                self._block, self._used = _huge_block(max(size, ARENA_BYTES)), 0
            start = self._used
            self._used += size
            return self._block[start : start + num_bytes]


def _huge_block(num_bytes: int) -> Tensor:
    # Shared memory, which is Python's default, gets no huge pages on most systems.
    is_private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    block = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, **is_private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(block, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE_BYTES
    return tensor[start : start + num_bytes]
