"""The end of the decode kernel: the pieces of a tile become a result, and what is done to it.

The workspace holds each program's two pieces (kernels/gpu/decode_kernel.py): the first of its
tiles in piece 0, any later one in piece 1. Adding them in the order of the programs makes the sum
the same whoever finishes last.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_pieces(
    workspace, first_program, last_program, num_programs, total_steps, steps, tile, row, tokens,
    left, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of a tile's pieces in the order of the programs that left them: [TOKENS, rows]."""
    at = workspace + row[None, :] + tokens[:, None] * ROWS
    there = tokens[:, None] < left
    total = tl.zeros([TOKENS, row.shape[0]], tl.float32)
    for p in range(first_program, last_program + 1):
        is_first = (p * total_steps) // num_programs // steps == tile
        piece = p * 2 + 1 - is_first.to(tl.int32)
        # Past L1, which may not know what other processors wrote.
        total += tl.load(at + piece * (TOKENS * ROWS), mask=there, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def finish(
    workspace, first_program, last_program, num_programs, total_steps, steps, tile,
    out, out_stride, bias, residual, row0, num_rows, column0, token0, left,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reduce a tile, add bias and residual, store."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    result = _add_pieces(
        workspace, first_program, last_program, num_programs, total_steps, steps, tile, lane,
        tokens, left, TOKENS, ROWS,
    )  # fmt: skip
    row = row0 + lane
    there = (row < num_rows)[None, :] & (tokens < left)[:, None]
    if HAS_BIAS:
        addend = tl.load(bias + row, mask=row < num_rows, other=0.0)
        result += addend.to(tl.float32)[None, :]
    to = (token0 + tokens)[:, None] * out_stride + column0 + row[None, :]
    if HAS_RESIDUAL:  # the product is rounded first, as if the residual were added afterwards
        result = result.to(DTYPE).to(tl.float32)
        result += tl.load(residual + to, mask=there, other=0.0).to(tl.float32)
    tl.store(out + to, result.to(DTYPE), mask=there)


@triton.jit
def finish_silu(
    workspace, first_program, last_program, num_programs, total_steps, steps, tile,
    out, out_stride, bias_gate, bias_up, num_rows, token0, left,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Reduce a tile of gate and up rows, add their biases, store SiLU(gate) * up.

    Rounded where separate kernels would round: gate, up and SiLU.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    HALF: tl.constexpr = ROWS // 2
    lane = tl.arange(0, HALF)
    tokens = tl.arange(0, TOKENS)
    gate = _add_pieces(
        workspace, first_program, last_program, num_programs, total_steps, steps, tile, lane,
        tokens, left, TOKENS, ROWS,
    )  # fmt: skip
    up = _add_pieces(
        workspace, first_program, last_program, num_programs, total_steps, steps, tile,
        lane + HALF, tokens, left, TOKENS, ROWS,
    )  # fmt: skip
    row = tile * HALF + lane
    there = (row < num_rows)[None, :] & (tokens < left)[:, None]
    if HAS_BIAS:
        gate += tl.load(bias_gate + row, mask=row < num_rows, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_up + row, mask=row < num_rows, other=0.0).to(tl.float32)[None, :]
    gate = gate.to(DTYPE).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    result = gate * up.to(DTYPE).to(tl.float32)
    to = (token0 + tokens)[:, None] * out_stride + row[None, :]
    tl.store(out + to, result.to(DTYPE), mask=there)
