"""float8 e4m3 in Triton, bit by bit: the same on every chip and under the interpreter.

Chips before Ada have no such type, and the interpreter's differs from PyTorch's. Codes are read in
pairs, as 16 bits: then they pass through shared memory as any 16-bit operand of a product does,
and both of a pair become float16 by shifting: e4m3's exponent and fraction are float16's upper
bits, but for the exponents' biases, which are 8 apart. That is left to whoever applies the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

BIAS = 8
"""Codes that were read are too small by this power of two."""

EVEN_PTX = tl.constexpr("""{ .reg .b32 sign, rest;
    shl.b32 sign, $1, 8;
    shl.b32 rest, $1, 7;
    and.b32 rest, rest, 0x3f803f80;
    lop3.b32 $0, sign, 0x80008000, rest, 0xea;
}""")
"""float16 of the lower code of two pairs; lop3 0xea is (a & b) | c."""

ODD_PTX = tl.constexpr("""{ .reg .b32 rest;
    shr.u32 rest, $1, 1;
    and.b32 rest, rest, 0x3f803f80;
    lop3.b32 $0, $1, 0x80008000, rest, 0xea;
}""")
"""Of the upper code."""


@triton.jit
def from_pairs(pairs, ASM: tl.constexpr):
    """float16 of the lower and of the upper code of int16 pairs, 2**-BIAS of what they mean."""
    if ASM:
        even = tl.inline_asm_elementwise(EVEN_PTX, "=r,r", [pairs], tl.int16, True, 2)
        odd = tl.inline_asm_elementwise(ODD_PTX, "=r,r", [pairs], tl.int16, True, 2)
    else:
        even = ((pairs << 8) & -0x8000) | ((pairs << 7) & 0x3F80)
        odd = (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
        even = even.to(tl.int16)
        odd = odd.to(tl.int16)
    return even.to(tl.float16, bitcast=True), odd.to(tl.float16, bitcast=True)


@triton.jit
def scale_of(bits):
    """The scale byte for heads whose largest magnitude has these int32 bits; kernels/fp8_cache.py.

    Largest magnitudes are compared as integers, where infinity and NaN come last.
    """
    scale = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
    return tl.where(bits >= 0x7E800000, 255, scale)


@triton.jit
def to_e4m3(x, scale):
    """uint8 codes of float32 over their int32 scale bytes, to nearest, ties to even."""
    inverse = ((254 - tl.minimum(scale, 245)) << 23).to(tl.float32, bitcast=True)
    bits = (x * inverse).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: drop 20 bits of the fraction, then move the bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Smaller ones are multiples of 2**-9: adding 2**14 makes that the last bit of a float32.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(magnitude < 0x3C800000, small & 0xF, normal)  # below 2**-6
    code = tl.where(magnitude > 0x43E00000, 0x7F, code)  # beyond 448: not finite
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
