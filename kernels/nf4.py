"""The 4-bit codec: quantise a weight to NF4 or FP4 and back, to the byte as bitsandbytes does.

Layout   the weight is flattened; two codes per byte, the first element in the high nibble. Each `group_size` consecutive
         elements share one scale, their largest magnitude (absmax). A group may span rows; the last may be partial.
         Double quantisation stores the scales as 8-bit codes: blocks of 256 scales share one float32 (nested absmax),
         after one mean per tensor (nested offset) has been subtracted.
Source   QLoRA, arXiv:2305.14314, section 3 and appendix E; the 8-bit map: arXiv:2110.02861, section 1.3.
         The numbers are those of bitsandbytes 0.50, which differ from the paper in places (see dynamic_map).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch

QuantType = Literal["nf4", "fp4"]

GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Scales that share one nested absmax."""
CHUNK = 1 << 18
"""Elements handled at a time, so that temporaries stay in cache and small next to the tensor. Every group size divides it."""
SMALLEST_ABSMAX = 1e-38
"""Groups are divided by no less, so that an all-zero group gives zeros."""

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def derive_nf4_codebook() -> list[float]:
    """NormalFloat: quantiles of N(0, 1), 7 negative and 8 positive with an exact zero between, scaled into [-1, 1].

    The outermost quantile is the mean of 1 - 1/30 and 1 - 1/32, which centres the two halves' outer bins.
    Exact to double precision; the published table was made in float32 and differs by up to 2e-7.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        """Quantiles at `count` equal steps from the outermost towards the median, which is left out."""
        return [quantile(outermost + (0.5 - outermost) * i / count) for i in range(count)]

    values = sorted([-q for q in half(7)] + [0.0] + half(8))
    return [value / quantile(outermost) for value in values]


def derive_dynamic_map() -> list[float]:
    """The signed dynamic 8-bit map: 256 sorted values whose density grows with their magnitude's decade.

    Decade i of 7 holds 2**i values of each sign: the midpoints of as many equal intervals of [0.1, 1], times 10**(i - 6).
    Zero and +1 complete the map; -1 is missing. Midpoints are taken in float32.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        midpoints = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += midpoints + [-value for value in midpoints]
    return sorted(values)


# The published NF4 values, the float32 numbers that every checkpoint carries.
NF4_CODEBOOK = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=torch.float32,
)  # fmt: skip
# FP4 in order of the bit pattern: sign, two bits of exponent, one of fraction; twelfths.
FP4_CODEBOOK = torch.tensor(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], dtype=torch.float32
) / 12  # fmt: skip
DYNAMIC_MAP = torch.tensor(derive_dynamic_map(), dtype=torch.float32)


def codebook(quant_type: QuantType) -> Tensor:
    """The 16 values of a 4-bit type: float32 [16], on the CPU, indexed by code."""
    check(quant_type in ("nf4", "fp4"), "quant_type", "nf4 or fp4", quant_type)
    return NF4_CODEBOOK if quant_type == "nf4" else FP4_CODEBOOK


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A 4-bit weight matrix. The fields agree with each other; the constructor checks it."""

    packed: Tensor
    """uint8 [ceil(numel / 2)]: byte i holds elements 2i (high nibble) and 2i + 1."""
    absmax: Tensor
    """One scale per group: uint8 [num_groups], indices into DYNAMIC_MAP, when double-quantised; else float32."""
    nested_absmax: Tensor | None = None
    """float32 [ceil(num_groups / 256)]; None without double quantisation."""
    nested_offset: Tensor | None = None
    """float32 []; None without double quantisation."""
    shape: tuple[int, int]
    """(out_features, in_features)."""
    dtype: torch.dtype
    """The original weight's, and what dequantising returns by default."""
    quant_type: QuantType = "nf4"
    group_size: int = 64

    def __post_init__(self) -> None:
        codebook(self.quant_type)
        check(self.group_size in GROUP_SIZES, "group_size", f"one of {GROUP_SIZES}", self.group_size)
        check(self.dtype in FLOAT_DTYPES, "dtype", "float32, bfloat16 or float16", self.dtype)
        check(len(self.shape) == 2 and min(self.shape) > 0, "shape", "(out_features, in_features)", self.shape)
        is_nested = self.nested_absmax is not None
        check(is_nested == (self.nested_offset is not None), "nested_offset", "with nested_absmax or not at all", self.nested_offset)
        _check_tensor("packed", self.packed, torch.uint8, (-(-self.numel // 2),))
        _check_tensor("absmax", self.absmax, torch.uint8 if is_nested else torch.float32, (self.num_groups,))
        if self.nested_absmax is not None and self.nested_offset is not None:
            _check_tensor("nested_absmax", self.nested_absmax, torch.float32, (-(-self.num_groups // NESTED_BLOCK),))
            _check_tensor("nested_offset", self.nested_offset, torch.float32, ())

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def num_groups(self) -> int:
        return -(-self.numel // self.group_size)

    @property
    def num_bytes(self) -> int:
        """Memory held: codes and scales."""
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_offset=None if self.nested_offset is None else self.nested_offset.to(device),
            shape=self.shape, dtype=self.dtype, quant_type=self.quant_type, group_size=self.group_size,
        )  # fmt: skip


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(tensor.dtype == dtype, f"{name}.dtype", dtype, tensor.dtype)
    check(tuple(tensor.shape) == shape, f"{name}.shape", shape, tuple(tensor.shape))
    check(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")


def quantize_4bit(
    weight: Tensor, *, quant_type: QuantType = "nf4", group_size: int = 64, double_quant: bool = True
) -> QuantizedWeight:
    """Quantise a weight; every byte equals what bitsandbytes' quantize_4bit stores.

    Codes are chosen by the exact scales, before these are quantised in their turn.

    Args:
        weight: float32, bfloat16 or float16 [out_features, in_features].
        group_size: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.

    Raises:
        ValueError: an argument is none of these; the weight holds NaN or infinity, or magnitudes so large that the
            mean of the scales overflows.
    """
    check(weight.dim() == 2 and weight.numel() > 0, "weight.shape", "two dimensions, not empty", tuple(weight.shape))
    check(weight.dtype in FLOAT_DTYPES, "weight.dtype", "float32, bfloat16 or float16", weight.dtype)
    check(group_size in GROUP_SIZES, "group_size", f"one of {GROUP_SIZES}", group_size)
    values, code_of_rank = codebook(quant_type).to(weight.device).sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2

    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-numel // group_size), dtype=torch.float32, device=flat.device)
    for start in range(0, numel, CHUNK):
        normalised, scales = _normalise(flat[start : start + CHUNK].float(), group_size)
        absmax[start // group_size : start // group_size + len(scales)] = scales
        codes = code_of_rank[torch.bucketize(normalised, midpoints, out_int32=True)].to(torch.uint8)
        packed[start // 2 : start // 2 + len(codes) // 2] = codes[0::2] << 4 | codes[1::2]
    check(bool(absmax.isfinite().all()), "weight", "finite numbers", "NaN or infinity in it")

    nested_absmax = nested_offset = None
    if double_quant:
        nested_offset = absmax.mean()
        check(bool(nested_offset.isfinite()), "weight", "scales whose mean is finite; use double_quant=False", nested_offset.item())
        absmax, nested_absmax = _quantize_scales(absmax - nested_offset)
    return QuantizedWeight(
        packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset,
        shape=(weight.shape[0], weight.shape[1]), dtype=weight.dtype, quant_type=quant_type, group_size=group_size,
    )  # fmt: skip


def _normalise(flat: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Divide each group by its absmax: (float32 [numel, made even with a zero], absmax float32 [num_groups]).

    Full groups are multiplied by the reciprocal and a partial last one is divided, and only the latter's absmax is kept
    away from zero: bitsandbytes does so, and the last bit of a quotient can decide a code.
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
    """8-bit codes of centred scales: (uint8 [num_groups], nested absmax float32 [ceil(num_groups / 256)]).

    As bitsandbytes on a CPU: the normalised scale is rounded to one of 65536 grid points, and the map value nearest to
    that is taken. Its CUDA kernel has no grid; the codes differ by one where a scale is within 1.6e-5 of a midpoint.
    """
    num_blocks = -(-len(scales) // NESTED_BLOCK)
    blocks = torch.nn.functional.pad(scales, (0, num_blocks * NESTED_BLOCK - len(scales))).view(num_blocks, NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(dim=1)
    normalised = (blocks * (1.0 / nested_absmax)[:, None]).clamp_(-1, 1)
    normalised.nan_to_num_(nan=-1.0)  # 0 * inf where all scales of a block equal the offset: code 0, times absmax 0
    grid_points = ((normalised + 1.0) * 32767.5 + 0.5).int()
    codes = _code_of_grid_point().to(scales.device)[grid_points]
    return codes.view(-1)[: len(scales)].clone(), nested_absmax


@cache
def _code_of_grid_point() -> Tensor:
    """uint8 [65536]: the index of the DYNAMIC_MAP value nearest to each of 65536 equally spaced points of [-1, 1]."""
    points = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    values = DYNAMIC_MAP.double()
    return torch.bucketize(points, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def decode_absmax(weight: QuantizedWeight) -> Tensor:
    """The scales of a weight, double quantisation undone: float32 [num_groups]."""
    if weight.nested_absmax is None:
        return weight.absmax
    scales = DYNAMIC_MAP.to(weight.device)[weight.absmax.int()]  # [num_groups]
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(scales)]
    return scales.mul_(nested).add_(weight.nested_offset)


def dequantize_4bit(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Expand a weight: [out_features, in_features], codebook value times scale in float32, rounded once.

    Args:
        dtype: float32, bfloat16 or float16; the original weight's when None.

    Raises:
        ValueError: another dtype is asked for.
    """
    dtype = dtype or weight.dtype
    check(dtype in FLOAT_DTYPES, "dtype", "float32, bfloat16 or float16", dtype)
    return dispatch("dequantize_4bit", dequantize_4bit_reference, weight, dtype)


def dequantize_4bit_reference(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dequantize_4bit in plain PyTorch: a table of 256 pairs, one per byte, read as 64-bit words."""
    table = codebook(weight.quant_type).to(weight.device)
    byte = torch.arange(256, device=weight.device)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=1).view(torch.int64).view(-1)  # [256]
    absmax = decode_absmax(weight)
    numel, group_size = weight.numel, weight.group_size
    out = torch.empty(numel, dtype=dtype, device=weight.device)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        scales = absmax[start // group_size : -(-stop // group_size)]
        values = pairs[weight.packed[start // 2 : -(-stop // 2)].int()].view(torch.float32)  # [stop - start, or 1 more]
        full = (stop - start) // group_size * group_size
        values[:full].view(-1, group_size).mul_(scales[: full // group_size, None])
        if full < stop - start:
            values[full:].mul_(scales[-1])
        out[start:stop] = values[: stop - start]
    return out.view(weight.shape)
