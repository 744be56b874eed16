"""The table that the decode kernel looks bytes up in, and the PTX that fills and reads it.

A byte of codes becomes two neighbouring weights by one shared-memory load: entry `byte` is a pair
of 16-bit floats, the high nibble's in the low half. Every entry is there 32 times, once per bank,
so that the lanes of a warp never meet in a bank: 32 KB. The 8-bit map of the scales follows, once.

The strings are run by an emulator in the tests, byte for byte as they are written here. They read
%laneid themselves and have one tensor operand each: a second would stop Triton's propagation of
layouts. The shared arrays are declared outside braces, so that later assembly sees their names.

Layout  int32 [528] on the device: 256 pairs, 256 float32 scales, 16 float32 codebook values as
        rounded to the 16-bit type (for the branch without assembly).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels.codebooks import DYNAMIC_MAP, QuantType, codebook

SHARED_BYTES = 256 * 32 * 4 + 256 * 4
"""Static shared memory of a kernel that fills the table."""


@cache
def device_table(quant_type: QuantType, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table for weights of one 4-bit type and activations of one dtype, as laid out above."""
    values = codebook(quant_type).to(dtype)
    if dtype == torch.float32:  # never read as pairs
        pairs = torch.zeros(256, dtype=torch.int32)
    else:
        byte = torch.arange(256)
        pairs = torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int32).view(-1)
    parts = [pairs, DYNAMIC_MAP.view(torch.int32), values.float().view(torch.int32)]
    return torch.cat(parts).to(device)


def fill_ptx(num_warps: int) -> str:
    """PTX that fills both arrays from the table at $1, by a thread block of so many warps.

    A thread loads one pair per round; the warp then passes its 32 pairs round by shuffles and
    stores each 32 times, 16 bytes per lane. $0 is a result that means nothing.
    """
    lines = [
        ".shared .align 128 .b8 herd_pairs[32768];",
        ".shared .align 16 .b8 herd_scales[1024];",
        "{ .reg .b32 lane, warp, thread, value, source, part, pairs, scales, at;",
        ".reg .b64 offset, address;",
        "mov.u32 lane, %laneid; mov.u32 thread, %tid.x; shr.u32 warp, thread, 5;",
        "mov.u32 pairs, herd_pairs; mov.u32 scales, herd_scales;",
        "shl.b32 at, warp, 12; add.u32 pairs, pairs, at;",
        "shl.b32 at, lane, 4; add.u32 pairs, pairs, at;",
        "shl.b32 at, thread, 2; add.u32 scales, scales, at;",
        "mul.wide.u32 offset, thread, 4; add.u64 address, $1, offset;",
    ]
    num_threads = 32 * num_warps
    for entry in range(0, 256, num_threads):
        lines += [
            f"ld.global.b32 value, [address+{entry * 4 + 1024}];",
            f"st.shared.b32 [scales+{entry * 4}], value;",
            f"ld.global.b32 value, [address+{entry * 4}];",
        ]
        for part in range(8):  # four entries of 128 bytes each
            lines += [
                f"shr.u32 source, lane, 3; add.u32 source, source, {part * 4};",
                "shfl.sync.idx.b32 part, value, source, 31, 0xffffffff;",
                f"st.shared.v4.b32 [pairs+{entry * 128 + part * 512}], {{part, part, part, part}};",
            ]
    return "\n".join([*lines, "mov.u32 $0, lane; bar.sync 0; }"])


DECODE_PTX = """{
.reg .b32 lane, pairs, at;
mov.u32 lane, %laneid; shl.b32 lane, lane, 2; mov.u32 pairs, herd_pairs;
shl.b32 at, $4, 7; lop3.b32 at, at, 0x7f80, lane, 0xEA; add.u32 at, at, pairs;
ld.shared.b32 $0, [at];
shr.u32 at, $4, 1; lop3.b32 at, at, 0x7f80, lane, 0xEA; add.u32 at, at, pairs;
ld.shared.b32 $1, [at];
shr.u32 at, $4, 9; lop3.b32 at, at, 0x7f80, lane, 0xEA; add.u32 at, at, pairs;
ld.shared.b32 $2, [at];
shr.u32 at, $4, 17; lop3.b32 at, at, 0x7f80, lane, 0xEA; add.u32 at, at, pairs;
ld.shared.b32 $3, [at];
}"""
"""Four neighbouring bytes of a row, $4, to eight weights: $0 and $1 the first four, $2 and $3 the
last, a pair of 16-bit floats each."""

SCALES_PTX = """{
.reg .b32 scales, at;
mov.u32 scales, herd_scales;
shl.b32 at, $4, 2; and.b32 at, at, 0x3fc; add.u32 at, at, scales; ld.shared.b32 $0, [at];
shr.u32 at, $4, 6; and.b32 at, at, 0x3fc; add.u32 at, at, scales; ld.shared.b32 $1, [at];
shr.u32 at, $4, 14; and.b32 at, at, 0x3fc; add.u32 at, at, scales; ld.shared.b32 $2, [at];
shr.u32 at, $4, 22; and.b32 at, at, 0x3fc; add.u32 at, at, scales; ld.shared.b32 $3, [at];
}"""
"""The 8-bit codes of four consecutive scales, $4, to what they stand for: $0 to $3, float32."""
