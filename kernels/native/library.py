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

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""api.h's Dtype."""
ARENA_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20
_loaded: list[ctypes.CDLL] = []


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
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    library.herd_choose.argtypes = (ctypes.c_char_p, pointer)
    library.herd_set_num_threads.argtypes = (integer,)
    library.herd_relayout.argtypes = (pointer, pointer, long, long, integer)
    library.herd_linear.argtypes = (integer, pointer, integer, pointer, long, pointer, long)
    library.herd_dequantize.argtypes = (integer, pointer, pointer)
    library.herd_read.argtypes = (pointer, long)
    for name in ("choose", "set_num_threads", "relayout", "linear", "dequantize", "read"):
        getattr(library, f"herd_{name}").restype = integer if name == "choose" else None
    sets = library.herd_instruction_sets().decode().split()
    chosen = sets[0] if instruction_set == "auto" else instruction_set
    if not library.herd_choose(chosen.encode(), DYNAMIC_MAP.data_ptr()):
        raise ValueError(f"HERD_NATIVE_ISA: expected auto, none or one of {sets}, got {chosen!r}")
    library.herd_set_num_threads(default_num_threads())
    _loaded.append(library)
    return library


def set_num_threads(num_threads: int) -> None:
    """How many threads the native kernels use, if they are loaded."""
    if _loaded:
        _loaded[0].herd_set_num_threads(num_threads)


def default_num_threads() -> int:
    """Physical cores that this process may run on; their second threads add nothing here."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
            with open(f"{folder}/thread_siblings_list", encoding="ascii") as siblings:
                cores.add(siblings.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


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
    block = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(block, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE_BYTES
    return tensor[start : start + num_bytes]
