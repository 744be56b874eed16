"""The kernel for few tokens: 4-bit weights times up to 32 tokens, at the speed of memory.

Weights stay as bitsandbytes lays them out. A program takes a tile of rows and walks along them;
bytes become pairs of 16-bit weights by a look-up in shared memory (pair_table.py) and go straight
into the tensor cores, whose sum over each group of 64 is multiplied by the group's scale in
float32, so that a weight is the codebook's value rounded to x's dtype, times the exact scale.

Order of x. Four neighbouring bytes hold eight consecutive weights; a look-up gives two of them.
With the first four in one operand and the last four in another, no nibble has to be moved, and
column c of the operands is element 8 (c / 4) + c % 4 of the group, and four more: runs of four in
x as it is. That rests on a thread holding four neighbouring bytes, which is what kWidth = 4 in the
operand's layout says; the tests read it from the compiled code, and the start-up test would see
any other.

Work and its reduction. All tiles times all steps of 256 columns are dealt out evenly: program p
does steps p * total / programs up to (p + 1) * total / programs, across the ends of tiles. Each
piece of a tile is left in the workspace; who finishes last adds the pieces up in order and runs
the epilogue. So results depend on the number of programs, fixed per device, and on nothing else:
not on who is last, not on the other tokens, nor on their number (tokens come in eights).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu import pair_table
from kernels.gpu.decode_epilogue import finish, finish_silu

GROUP = tl.constexpr(64)
GROUP_BYTES = tl.constexpr(32)
STEP_GROUPS = tl.constexpr(4)
"""Groups of a row per step: their four 8-bit scales are one 32-bit word."""
STEP = 256
"""Columns per step."""

_FILL_4 = tl.constexpr(pair_table.fill_ptx(4))
_FILL_8 = tl.constexpr(pair_table.fill_ptx(8))
_DECODE = tl.constexpr(pair_table.DECODE_PTX)
_SCALES = tl.constexpr(pair_table.SCALES_PTX)


@triton.jit
def _fill(table, NUM_WARPS: tl.constexpr):
    """Fill the shared table, once per program."""
    if NUM_WARPS == 4:
        tl.inline_asm_elementwise(
            _FILL_4, "=r,l", [table.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            _FILL_8, "=r,l", [table.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _decode(table, row_bytes, columns, ASM: tl.constexpr, IS_BF16: tl.constexpr):
    """One group of each row as two operands [rows, 32]; row_bytes points at its first byte."""
    if ASM:
        codes = tl.load(row_bytes[:, None] + columns[None, :])
        if IS_BF16:
            first, last = tl.inline_asm_elementwise(
                _DECODE, "=&r,=&r,=&r,=&r,r", [codes],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            first, last = tl.inline_asm_elementwise(
                _DECODE, "=&r,=&r,=&r,=&r,r", [codes],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        byte = columns // 4 * 4 + columns % 4 // 2
        shift = (1 - columns % 2) * 4
        codes = tl.load(row_bytes[:, None] + byte[None, :]).to(tl.int32) >> shift[None, :]
        first = tl.load(table + 512 + (codes & 15)).to(tl.float32, bitcast=True)
        codes = tl.load(row_bytes[:, None] + byte[None, :] + 2).to(tl.int32) >> shift[None, :]
        last = tl.load(table + 512 + (codes & 15)).to(tl.float32, bitcast=True)
    return first, last


@triton.jit
def _scales(table, codes, ASM: tl.constexpr):
    """Four scales, before the nested ones come in, of each word of codes."""
    if ASM:
        s0, s1, s2, s3 = tl.inline_asm_elementwise(
            _SCALES,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        s0 = tl.load(table + 256 + (codes & 255)).to(tl.float32, bitcast=True)
        s1 = tl.load(table + 256 + (codes >> 8 & 255)).to(tl.float32, bitcast=True)
        s2 = tl.load(table + 256 + (codes >> 16 & 255)).to(tl.float32, bitcast=True)
        s3 = tl.load(table + 256 + (codes >> 24 & 255)).to(tl.float32, bitcast=True)
    return s0, s1, s2, s3


@triton.jit
def _load_tokens(x, columns, tokens, num_tokens, stride, ASM: tl.constexpr):
    """[32, 8]: one operand's columns of eight tokens; zeros for those that are not there."""
    at = x + columns[:, None] + tokens[None, :] * stride
    values = tl.load(at, mask=tokens[None, :] < num_tokens, other=0.0)
    if not ASM:
        values = values.to(tl.float32)
    return values


@triton.jit
def _multiply(acc, first, last, scale, x, columns, tokens, num_tokens, stride, ASM: tl.constexpr):
    """acc [rows, 8] + scale * (the group's columns times eight tokens)."""
    x_first = _load_tokens(x, columns, tokens, num_tokens, stride, ASM)
    x_last = _load_tokens(x + 4, columns, tokens, num_tokens, stride, ASM)
    part = tl.dot(first, x_first)
    part = tl.dot(last, x_last, part)
    return acc + part * scale[:, None]


_VARYING = ["num_tokens", "total_steps", "rows0", "rows1", "rows2"]
"""Sizes that no variant of the kernel is compiled for."""


@triton.jit(do_not_specialize=_VARYING)
def decode_kernel(
    x, out, workspace, counters, table,
    packed0, absmax0, nested0, offset0, bias0, rows0,
    packed1, absmax1, nested1, offset1, bias1, rows1,
    packed2, absmax2, nested2, offset2, bias2, rows2,
    residual, num_tokens, row_size, total_steps, out_stride,
    NUM_SLICES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, ASM: tl.constexpr, NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """See the head. x [num_tokens, row_size]; grid (programs, ceil(num_tokens / TOKENS)).

    packed, absmax, nested, offset, bias and number of rows of up to three slices; SILU takes two
    of equal size and interleaves them: half a tile's rows are the gate's, half the up's.
    workspace float32 [token tiles, programs, 2, TOKENS, ROWS]; counters int32 [token tiles,
    tiles], zeros before and after; residual as out, added last.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    token0 = tl.program_id(1) * TOKENS
    IS_BF16: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    HALF: tl.constexpr = ROWS // 2
    if ASM:
        _fill(table, NUM_WARPS)
    steps = row_size // (GROUP * STEP_GROUPS)  # of a tile
    tiles0 = (rows0 + ROWS - 1) // ROWS
    tiles1 = (rows1 + ROWS - 1) // ROWS
    num_tiles = total_steps // steps
    workspace += tl.program_id(1) * num_programs * 2 * TOKENS * ROWS
    counters += tl.program_id(1) * num_tiles
    groups = row_size // GROUP  # of a row
    bytes_per_row = tl.multiple_of(row_size // 2, 128)

    lane = tl.arange(0, ROWS)
    columns = tl.arange(0, GROUP_BYTES)
    x_columns = tl.max_contiguous(8 * (columns // 4) + columns % 4, 4)
    eight = tl.arange(0, 8)
    x += token0 * row_size
    left = num_tokens - token0

    step = (program * total_steps) // num_programs
    stop = ((program + 1) * total_steps) // num_programs
    first_tile = step // steps
    while step < stop:
        tile = step // steps
        begin = step - tile * steps
        end = tl.minimum(steps, begin + stop - step)

        packed = packed0
        absmax = absmax0
        nested = nested0
        offset_at = offset0
        bias = bias0
        num_rows = rows0
        column0 = 0
        slice_tile = tile
        if SILU:
            row = tile * HALF + lane % HALF
            is_up = lane >= HALF
            row = tl.minimum(row, rows0 - 1)
            apart = packed1.to(tl.int64) - packed0.to(tl.int64)
            row_bytes = packed0 + row.to(tl.int64) * bytes_per_row
            row_bytes += tl.where(is_up, tl.multiple_of(apart, 16), 0)
            word = row * (groups // 4)
        else:
            if NUM_SLICES > 1:  # noqa: SIM102  known when compiling
                if tile >= tiles0:
                    packed = packed1
                    absmax = absmax1
                    nested = nested1
                    offset_at = offset1
                    bias = bias1
                    num_rows = rows1
                    column0 = rows0
                    slice_tile = tile - tiles0
            if NUM_SLICES > 2:  # noqa: SIM102
                if tile >= tiles0 + tiles1:
                    packed = packed2
                    absmax = absmax2
                    nested = nested2
                    offset_at = offset2
                    bias = bias2
                    num_rows = rows2
                    column0 = rows0 + rows1
                    slice_tile = tile - tiles0 - tiles1
            row = tl.minimum(slice_tile * ROWS + lane, num_rows - 1)
            row_bytes = packed + row.to(tl.int64) * bytes_per_row
            word = row * (groups // 4)

        # The scales of a step are loaded one step ahead, so that nothing waits for them.
        if DOUBLE_QUANT:
            words = absmax.to(tl.pointer_type(tl.int32)) + word
            nested_at = nested + tl.zeros_like(word)
            offset = tl.load(offset_at) + tl.zeros([ROWS], tl.float32)
            if SILU:
                apart = absmax1.to(tl.int64) - absmax0.to(tl.int64)
                words += tl.where(is_up, apart // 4, 0)
                apart = nested1.to(tl.int64) - nested0.to(tl.int64)
                nested_at += tl.where(is_up, apart // 4, 0)
                offset = tl.where(is_up, tl.load(offset1), offset)
            next_codes = tl.load(words + begin)
            next_nested = tl.load(nested_at + ((word + begin) >> 6))
        else:
            scale_at = absmax + word * 4
            if SILU:
                apart = absmax1.to(tl.int64) - absmax0.to(tl.int64)
                scale_at += tl.where(is_up, apart // 4, 0)
            next0 = tl.load(scale_at + begin * 4)
            next1 = tl.load(scale_at + begin * 4 + 1)
            next2 = tl.load(scale_at + begin * 4 + 2)
            next3 = tl.load(scale_at + begin * 4 + 3)

        # [ROWS, 8] for each eight tokens. Triton knows no starred tuples.
        accs = ()
        for _ in tl.static_range(TOKENS // 8):
            accs = accs + (tl.zeros([ROWS, 8], tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        for i in range(begin, end):
            ahead = tl.minimum(i + 1, end - 1)
            if DOUBLE_QUANT:
                s0, s1, s2, s3 = _scales(table, next_codes, ASM)
                s0 = s0 * next_nested + offset
                s1 = s1 * next_nested + offset
                s2 = s2 * next_nested + offset
                s3 = s3 * next_nested + offset
                next_codes = tl.load(words + ahead)
                next_nested = tl.load(nested_at + ((word + ahead) >> 6))
            else:
                s0 = next0
                s1 = next1
                s2 = next2
                s3 = next3
                next0 = tl.load(scale_at + ahead * 4)
                next1 = tl.load(scale_at + ahead * 4 + 1)
                next2 = tl.load(scale_at + ahead * 4 + 2)
                next3 = tl.load(scale_at + ahead * 4 + 3)
            for g in tl.static_range(STEP_GROUPS):
                if g == 0:
                    scale = s0
                elif g == 1:
                    scale = s1
                elif g == 2:
                    scale = s2
                else:
                    scale = s3
                at = i * (GROUP * STEP_GROUPS) + g * GROUP
                first, last = _decode(table, row_bytes + at // 2, columns, ASM, IS_BF16)
                xg = x + at
                sums = ()
                for t in tl.static_range(TOKENS // 8):
                    acc = _multiply(
                        accs[t], first, last, scale, xg, x_columns, eight + 8 * t, left, row_size,
                        ASM,
                    )  # fmt: skip
                    sums = sums + (acc,)  # type: ignore[assignment] # noqa: RUF005
                accs = sums

        piece = program * 2 + (tile != first_tile).to(tl.int32)
        to = workspace + piece * (TOKENS * ROWS) + lane[:, None] + eight[None, :] * ROWS
        for t in tl.static_range(TOKENS // 8):
            tl.store(to + 8 * t * ROWS, accs[t], mask=eight[None, :] + 8 * t < left)
        tl.debug_barrier()  # all threads' pieces are written before one thread says so

        first_program = ((tile * steps + 1) * num_programs - 1) // total_steps
        last_program = ((tile + 1) * steps * num_programs - 1) // total_steps
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == last_program - first_program:
            if SILU:
                finish_silu(
                    workspace, first_program, last_program, num_programs, total_steps, steps, tile,
                    out, out_stride, bias0, bias1, rows0, token0, left, HAS_BIAS, TOKENS, ROWS,
                )  # fmt: skip
            else:
                finish(
                    workspace, first_program, last_program, num_programs, total_steps, steps, tile,
                    out, out_stride, bias, residual, slice_tile * ROWS, num_rows, column0, token0,
                    left, HAS_BIAS, HAS_RESIDUAL, TOKENS, ROWS,
                )  # fmt: skip
            tl.store(counters + tile, 0)
        step += end - begin
