"""The 8-bit KV cache: float8 e4m3 codes, and a scale for each key and each value of each kv head.

Scales   uint8 [num_blocks, block_size, num_kv_heads], beside the codes: the exponent of a power of
         two, plus 127 (e8m0, as in the OCP microscaling formats; 255 = not finite, or at least
         2**126). It is the smallest that brings the head's largest magnitude to 448 or less: every
         head has its own range, however tokens differ, scaling rounds nothing, and one byte is
         added to head_dim codes. None is chosen beforehand or shared: no calibration is needed,
         and what is written never changes what was.
Codes    x / scale rounded to nearest even: off by at most 2**-4 of x, or 2**-10 of the scale where
         that is more.
Public   FP8, quantize_heads, scale_values, check_kv_scales, read_codes, write_fp8_cache_reference
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check

FP8 = torch.float8_e4m3fn
LARGEST_CODE = 448.0
NOT_FINITE = 255


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of heads.

    Args:
        x: [..., head_dim], any float dtype.

    Returns:
        float8 [..., head_dim] and uint8 [...].
    """
    x = x.float()
    bits = x.abs().amax(dim=-1).view(torch.int32)
    # 448 is 1.75 * 2**8: what has a larger fraction than 1.75 needs the next exponent.
    exponents = (((bits + 0x1FFFFF) >> 23) - 8).clamp(1, 245)
    inverse = ((254 - exponents) << 23).view(torch.float32)
    codes = (x * inverse[..., None]).to(FP8)
    return codes, exponents.masked_fill(bits >= 0x7E800000, NOT_FINITE).to(torch.uint8)


def scale_values(scales: Tensor) -> Tensor:
    """float32 of scales, infinity where they say that something was not finite."""
    return (scales.int() << 23).view(torch.float32)


def check_kv_scales(
    k_cache: Tensor, v_cache: Tensor, kv_scales: tuple[Tensor, Tensor] | None
) -> None:
    """Scales belong to an 8-bit cache, and only to one.

    Raises:
        ValueError: they are missing, superfluous, or of another shape or dtype.
    """
    if kv_scales is None:
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            check(cache.dtype != FP8, "kv_scales", f"scales, as {name} is 8-bit", None)
        return
    for name, cache, scales in zip("kv", (k_cache, v_cache), kv_scales, strict=True):
        check(cache.dtype == FP8, f"{name}_cache.dtype", FP8, cache.dtype)
        shape = tuple(cache.shape[:3])
        check(scales.shape == shape, f"{name}_scales.shape", shape, tuple(scales.shape))
        check(scales.dtype == torch.uint8, f"{name}_scales.dtype", torch.uint8, scales.dtype)


def write_fp8_cache_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: tuple[Tensor, Tensor],
) -> None:
    """write_kv_cache into an 8-bit cache, in plain PyTorch."""
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    for x, cache, scales in zip((k, v), (k_cache, v_cache), kv_scales, strict=True):
        codes, of_head = quantize_heads(x[stored])
        # As bytes: PyTorch does not index float8 everywhere.
        cache.view(torch.uint8).flatten(0, 1).index_copy_(0, slots, codes.view(torch.uint8))
        scales.flatten(0, 1).index_copy_(0, slots, of_head)


def read_codes(cache: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """float32 [len(slots), num_kv_heads, head_dim] of an 8-bit cache and its scales."""
    codes = cache.view(torch.uint8).flatten(0, 1).index_select(0, slots).view(FP8)
    of_head = scale_values(scales.flatten(0, 1).index_select(0, slots))
    return codes.float() * of_head[..., None]
