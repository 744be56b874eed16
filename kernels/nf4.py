"""The 4-bit codec: a weight to NF4 or FP4 and back, to the byte as bitsandbytes 0.50 does it.

Layout  The weight is flattened; two codes per byte, the first element in the high nibble. Every
        `group_size` consecutive elements share a scale, their largest magnitude (absmax). A group
        may span rows, and the last may be partial.
        Double quantisation stores the scales in 8 bits: one mean per tensor is subtracted (nested
        offset), then every 256 scales share a float32 scale of their own (nested absmax).
Source  QLoRA, arXiv:2305.14314, section 3; the order of rounding is bitsandbytes'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.codebooks import DYNAMIC_MAP, QuantType, codebook
from kernels.dispatch import check, dispatch
from kernels.layout import Layout, relayout

GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Scales that share one nested absmax."""
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CHUNK = 1 << 18
"""Elements handled at a time, so that temporaries stay in cache; a multiple of every group size."""
SMALLEST_ABSMAX = 1e-38
"""Groups are divided by no less, so that an all-zero group gives zeros."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A 4-bit weight matrix. Making one whose fields disagree raises ValueError."""

    packed: Tensor
    """uint8 [ceil(numel / 2)]: byte i holds elements 2i (high nibble) and 2i + 1."""
    absmax: Tensor
    """[num_groups]: uint8, indices into DYNAMIC_MAP, when double-quantised, else float32."""
    nested_absmax: Tensor | None = None
    """float32 [ceil(num_groups / 256)]; None without double quantisation."""
    nested_offset: Tensor | None = None
    """float32 []; None without double quantisation."""
    shape: tuple[int, int]
    """(out_features, in_features)."""
    dtype: torch.dtype
    """The original weight's, and what dequantising returns unless told otherwise."""
    quant_type: QuantType = "nf4"
    group_size: int = 64
    layout: Layout = "stock"
    """The order of packed's bytes: the checkpoint's, or what a kernel likes better."""
    int8_activations: bool = False
    """Whether what is multiplied with the weight is rounded to 8 bits, for speed."""

    def __post_init__(self) -> None:
        codebook(self.quant_type)
        check(self.group_size in GROUP_SIZES, "group_size", GROUP_SIZES, self.group_size)
        check(self.dtype in FLOAT_DTYPES, "dtype", FLOAT_DTYPES, self.dtype)
        is_matrix = len(self.shape) == 2 and min(self.shape) > 0
        check(is_matrix, "shape", "(out_features, in_features)", self.shape)
        _check_tensor("packed", self.packed, torch.uint8, (-(-self.numel // 2),))
        if self.nested_absmax is None or self.nested_offset is None:
            both_absent = self.nested_absmax is None and self.nested_offset is None
            check(both_absent, "nested_absmax and nested_offset", "both or neither", "one")
            _check_tensor("absmax", self.absmax, torch.float32, (self.num_groups,))
        else:
            num_blocks = -(-self.num_groups // NESTED_BLOCK)
            _check_tensor("absmax", self.absmax, torch.uint8, (self.num_groups,))
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, (num_blocks,))
            _check_tensor("nested_offset", self.nested_offset, torch.float32, ())

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_groups(self) -> int:
        return -(-self.numel // self.group_size)

    @property
    def num_bytes(self) -> int:
        """Memory held by codes and scales."""
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        nested = self.nested_absmax, self.nested_offset
        nested_absmax, nested_offset = (None if t is None else t.to(device) for t in nested)
        return QuantizedWeight(
            packed=self.packed.to(device), absmax=self.absmax.to(device),
            nested_absmax=nested_absmax, nested_offset=nested_offset,
            shape=self.shape, dtype=self.dtype,
            quant_type=self.quant_type, group_size=self.group_size, layout=self.layout,
            int8_activations=self.int8_activations,
        )  # fmt: skip

    def in_layout(self, layout: Layout) -> QuantizedWeight:
        """The same weight with its codes in another order; scales are shared."""
        if layout == self.layout:
            return self
        return replace(self, packed=relayout(self.packed, self.shape, layout), layout=layout)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(tensor.dtype == dtype, f"{name}.dtype", dtype, tensor.dtype)
    check(tensor.shape == shape, f"{name}.shape", shape, tuple(tensor.shape))
    check(tensor.is_contiguous(), f"{name}.stride()", "contiguous", tensor.stride())


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: QuantType = "nf4",
    group_size: int = 64,
    double_quant: bool = True,
) -> QuantizedWeight:
    """Quantise a weight. Codes are chosen by the exact scales, before these are quantised.

    Args:
        weight:       float32, bfloat16 or float16 [out_features, in_features].
        quant_type:   nf4 or fp4.
        group_size:   elements that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.

    Returns:
        What bitsandbytes' quantize_4bit stores for the same weight on a CPU, byte for byte. Besides
        it, memory for one float32 per group and for a chunk is used. On a GPU, codes and exact
        scales are these bytes too; the offset is a mean summed in another order, so that it and
        what is quantised relative to it may differ in the last bits.

    Raises:
        ValueError: an argument is none of these, the weight holds NaN or infinity, or it is so
            large that the mean of its scales overflows.
    """
    is_matrix = weight.dim() == 2 and weight.numel() > 0
    check(is_matrix, "weight.shape", "(out_features, in_features)", tuple(weight.shape))
    check(weight.dtype in FLOAT_DTYPES, "weight.dtype", FLOAT_DTYPES, weight.dtype)
    check(group_size in GROUP_SIZES, "group_size", GROUP_SIZES, group_size)
    packed, absmax = dispatch(
        "quantize_groups", quantize_groups_reference, weight.detach(), quant_type, group_size
    )
    check(bool(absmax.isfinite().all()), "weight", "finite numbers", "NaN or infinity in it")

    nested_absmax = nested_offset = None
    if double_quant:
        nested_offset = absmax.mean()
        is_finite = bool(nested_offset.isfinite())
        check(is_finite, "mean of absmax", "finite, or double_quant=False", nested_offset.item())
        absmax, nested_absmax = _quantize_scales(absmax - nested_offset)
    return QuantizedWeight(
        packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset,
        shape=(weight.shape[0], weight.shape[1]), dtype=weight.dtype,
        quant_type=quant_type, group_size=group_size,
    )  # fmt: skip


def quantize_groups_reference(
    weight: Tensor, quant_type: QuantType, group_size: int
) -> tuple[Tensor, Tensor]:
    """Codes and exact scales in plain PyTorch: (packed, absmax), laid out as QuantizedWeight's.

    A group with NaN or infinity in it has a scale that is not finite.
    """
    values, code_of_rank = codebook(quant_type).sort(stable=True)
    midpoints = ((values[:-1] + values[1:]) / 2).tolist()
    code_of_rank = code_of_rank.to(weight.device, torch.uint8)

    flat = weight.reshape(-1)
    numel = flat.numel()
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // group_size), dtype=torch.float32, device=flat.device)
    for start in range(0, numel, CHUNK):
        normalised, scales = _normalise(flat[start : start + CHUNK].float(), group_size)
        rank = torch.zeros_like(normalised, dtype=torch.uint8)
        for midpoint in midpoints:  # six times faster than torch.bucketize, which bisects
            rank += normalised > midpoint
        codes = code_of_rank.index_select(0, rank.int())
        packed[start // 2 : (start + len(codes)) // 2] = codes[0::2] << 4 | codes[1::2]
        absmax[start // group_size :][: len(scales)] = scales
    return packed, absmax


def _normalise(flat: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Divide each group by its absmax: (float32 [numel made even], absmax float32 [num_groups]).

    Full groups are multiplied by a reciprocal, a partial last one is divided, and only its absmax
    is kept from being zero: so does bitsandbytes, and the last bit of a quotient can decide a code.
    """
    full = len(flat) // group_size * group_size
    groups = flat[:full].view(-1, group_size)
    absmax = groups.abs().amax(dim=1)
    normalised = (groups * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]).view(-1)
    if full < len(flat):
        last = flat[full:].abs().amax().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        normalised = torch.cat([normalised, flat[full:] / last, flat.new_zeros(len(flat) % 2)])
    return normalised.clamp_(-1, 1), absmax


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of centred scales: (uint8 [num_groups], nested absmax float32 [num_blocks]).

    As bitsandbytes on a CPU: the normalised scale is rounded to one of 65536 grid points, and the
    map's nearest value to that is taken. Its CUDA kernel has no grid; the codes differ by one where
    a normalised scale is within 1.6e-5 of a midpoint of the map.
    """
    blocks = functional.pad(scales, (0, -len(scales) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(dim=1)
    normalised = (blocks * (1.0 / nested_absmax)[:, None]).clamp_(-1, 1)
    # A block of scales that all equal the offset is 0 * inf; its code 0 will be multiplied by 0.
    normalised.nan_to_num_(nan=-1.0)
    grid_points = ((normalised + 1.0) * 32767.5 + 0.5).int().view(-1)[: len(scales)]
    return _code_of_grid_point().to(scales.device).index_select(0, grid_points), nested_absmax


@cache
def _code_of_grid_point() -> Tensor:
    """uint8 [65536]: the code nearest to each of 65536 equally spaced points of [-1, 1]."""
    points = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    values = DYNAMIC_MAP.double()
    return torch.bucketize(points, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def decode_absmax(weight: QuantizedWeight) -> Tensor:
    """The scales of a weight, double quantisation undone: float32 [num_groups]."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax
    scales = DYNAMIC_MAP.to(weight.device).index_select(0, weight.absmax.int())
    _scale_blocks(scales, weight.nested_absmax, NESTED_BLOCK)
    return scales.add_(weight.nested_offset)


def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Expand a weight: codebook value times scale in float32, rounded once.

    Args:
        dtype: float32, bfloat16 or float16; None: the original weight's.

    Returns:
        dtype [out_features, in_features], on the weight's device.

    Raises:
        ValueError: another dtype is asked for.
    """
    dtype = dtype or weight.dtype
    check(dtype in FLOAT_DTYPES, "dtype", FLOAT_DTYPES, dtype)
    return dispatch("dequantize_4bit", dequantize_4bit_reference, weight, dtype)


def dequantize_4bit_reference(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dequantize_4bit in plain PyTorch."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    expand_into(out, weight)
    return out


def expand_into(out: Tensor, weight: QuantizedWeight) -> None:
    """Dequantise into `out`, contiguous and as large: two values looked up per byte, by chunks."""
    weight = weight.in_layout("stock")
    pairs = _pairs_of_bytes(weight.quant_type, weight.device)
    absmax = decode_absmax(weight)
    numel, group_size = weight.numel, weight.group_size
    flat = out.view(-1)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        packed = weight.packed[start // 2 : -(-stop // 2)].int()
        values = pairs.index_select(0, packed).view(torch.float32)[: stop - start]
        _scale_blocks(values, absmax[start // group_size : -(-stop // group_size)], group_size)
        flat[start:stop] = values


@cache
def _pairs_of_bytes(quant_type: QuantType, device: torch.device) -> Tensor:
    """int64 [256]: the two float32 values that a byte of codes stands for, as one word."""
    values, byte = codebook(quant_type), torch.arange(256)
    pairs = torch.stack([values[byte >> 4], values[byte & 15]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def _scale_blocks(values: Tensor, scales: Tensor, block: int) -> None:
    """Multiply every `block` consecutive values by their scale, in place; the last may be fewer."""
    full = len(values) // block * block
    values[:full].view(-1, block).mul_(scales[: full // block, None])
    if full < len(values):
        values[full:].mul_(scales[-1])
