"""Attention over the block tables in Triton: few new tokens in splits of the keys, many in one go.

A tile's rows are new tokens times the query heads that share a kv head, so that keys and values are
read once for all of them. Its keys come in stretches counted from position 0 of the sequence, so
that a row's sums do not depend on where its tile or its chunk begins, and splits hold a fixed
number of them: neither does a result depend on how many programs share the work.

Scores and sums are float32, with powers of two for e. For products, the weights are rounded to the
cache's dtype, or to float16 where the cache is 8-bit. There the scales stay outside of the
products: a key's multiplies its score, a value's is part of the weight, which then counts for the
sum divided by it. Heads are handled in two parts, because 8-bit codes are read in pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.fp8 import from_pairs

VARYING = ["first_seq", "table_width", "num_kv_heads", "group", "tiles", "max_splits", "window"]
"""Sizes that no variant of the kernels is compiled for."""


@triton.jit
def dimension(half, PART: tl.constexpr, HEAD_DIM: tl.constexpr, FP8: tl.constexpr):
    """Which elements of a head are in its part 0 or 1: first and second half, or even and odd."""
    return 2 * half + PART if FP8 else half + PART * (HEAD_DIM // 2)


@triton.jit
def _cached(
    cache, place, half, there, HEAD_DIM: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Both parts of keys or values [KEYS, HALF], in the products' dtype."""
    if FP8:
        pairs = tl.load(
            cache + place[:, None] * (HEAD_DIM // 2) + half[None, :], mask=there, other=0
        )
        first, second = from_pairs(pairs, ASM)
    else:
        at = cache + place[:, None] * HEAD_DIM + half[None, :]
        first = tl.load(at, mask=there, other=0.0)
        second = tl.load(at + HEAD_DIM // 2, mask=there, other=0.0)
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def _attend(
    rows0, rows1, position, oldest, k_cache, v_cache, k_scales, v_scales, table, lo, hi, head,
    num_kv_heads, scale,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    FP8: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend to the keys from lo, a multiple of KEYS, to hi; both parts of rows [ROWS, HALF].

    Row i sees keys from oldest[i] to position[i].

    Returns both parts of the sum of weighted values [ROWS, HALF], the largest score in powers of
    two [ROWS], and the sum of weights [ROWS].
    """
    ROWS: tl.constexpr = rows0.shape[0]
    lane = tl.arange(0, KEYS)
    half = tl.arange(0, HALF)
    acc0 = tl.zeros([ROWS, HALF], tl.float32)
    acc1 = tl.zeros([ROWS, HALF], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(lo, hi, KEYS):
        key = start + lane
        is_cached = key < hi
        block = tl.load(table + key // BLOCK_SIZE, mask=is_cached, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + key % BLOCK_SIZE) * num_kv_heads + head
        there = is_cached[:, None] & (half < HEAD_DIM // 2)[None, :]
        keys0, keys1 = _cached(k_cache, place, half, there, HEAD_DIM, FP8, DTYPE, ASM)
        scores = tl.dot(rows0, tl.trans(keys0), input_precision=PRECISION)
        scores = tl.dot(rows1, tl.trans(keys1), scores, input_precision=PRECISION)
        if FP8:
            of_key = tl.load(k_scales + place, mask=is_cached, other=127).to(tl.int32)
            of_value = tl.load(v_scales + place, mask=is_cached, other=127).to(tl.int32)
            factor = (of_key << 23).to(tl.float32, bitcast=True) * scale
            power = tl.where(of_value == 255, float("nan"), (of_value - 127).to(tl.float32))
            scores = scores * factor[None, :] + power[None, :]
        else:
            scores = scores * scale
        is_seen = (key[None, :] <= position[:, None]) & (key[None, :] >= oldest[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # where nothing was seen yet
        weights = tl.exp2(scores - finite_top[:, None])
        shrink = tl.exp2(top - finite_top)
        top = new_top
        if FP8:
            # 1 / scale, 2**-8 less (BIAS), as the codes are: it cancels out in the end.
            unscaled = ((246 - of_value) << 23).to(tl.float32, bitcast=True)
            total = total * shrink + tl.sum(weights * unscaled[None, :], 1)
        else:
            total = total * shrink + tl.sum(weights, 1)
        values0, values1 = _cached(v_cache, place, half, there, HEAD_DIM, FP8, DTYPE, ASM)
        weights = weights.to(DTYPE)
        acc0 = tl.dot(weights, values0, acc0 * shrink[:, None], input_precision=PRECISION)
        acc1 = tl.dot(weights, values1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, top, total


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    partial, stats, q, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens,
    cu_seqlens_q, first_seq, table_width, num_kv_heads, group, tiles, max_splits, window, scale,
    q_stride,
    QUERIES: tl.constexpr, ROOM: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, FP8: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sequences of up to QUERIES new tokens. Grid (programs, num_kv_heads, num_seqs * tiles).

    partial [seq, kv head, split, ROOM * group, 2 * HALF] and stats [the same, 2]: a split's
    weighted values, part by part, its largest score and its sum of weights. A sequence's splits
    are dealt out to its programs in turn; ROOM is the most new tokens that are kept, ROWS // group
    of them a tile: a decode's sums do not depend on the tokens that come with it.
    """
    head = tl.program_id(1)
    place = tl.program_id(2) // tiles
    tokens = ROWS // group
    first_query = (tl.program_id(2) % tiles) * tokens
    seq = first_seq + place
    begin = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - begin
    context = tl.load(context_lens + seq)
    if (num_new <= QUERIES) & (first_query < num_new):
        row = tl.arange(0, ROWS)
        query = first_query + row // group
        position = context - num_new + query
        oldest = tl.where(WINDOWED, position - window + 1, 0)
        half = tl.arange(0, HALF)
        is_row = (row < tokens * group) & (query < num_new)
        there = is_row[:, None] & (half < HEAD_DIM // 2)[None, :]
        at = (begin + query).to(tl.int64) * q_stride + (head * group + row % group) * HEAD_DIM
        at0 = at[:, None] + dimension(half, 0, HEAD_DIM, FP8)[None, :]
        at1 = at[:, None] + dimension(half, 1, HEAD_DIM, FP8)[None, :]
        rows0 = tl.load(q + at0, mask=there, other=0.0).to(DTYPE)
        rows1 = tl.load(q + at1, mask=there, other=0.0).to(DTYPE)
        first = 0
        if WINDOWED:
            first = tl.maximum(context - num_new - window + 1, 0) // SPLIT
        group_rows = ROOM * group
        table = block_tables + seq.to(tl.int64) * table_width
        base = (place.to(tl.int64) * num_kv_heads + head) * max_splits
        for split in range(first + tl.program_id(0), tl.cdiv(context, SPLIT), tl.num_programs(0)):
            acc0, acc1, top, total = _attend(
                rows0, rows1, position, oldest, k_cache, v_cache, k_scales, v_scales, table,
                split * SPLIT, tl.minimum((split + 1) * SPLIT, context), head, num_kv_heads, scale,
                HEAD_DIM, HALF, BLOCK_SIZE, KEYS, FP8, DTYPE, PRECISION, ASM,
            )  # fmt: skip
            to = (base + split) * group_rows + first_query * group + row
            to_part = partial + to[:, None] * (2 * HALF) + half[None, :]
            tl.store(to_part, acc0, mask=is_row[:, None])
            tl.store(to_part + HALF, acc1, mask=is_row[:, None])
            tl.store(stats + to * 2, top, mask=is_row)
            tl.store(stats + to * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=VARYING)
def join_kernel(
    out, partial, stats, context_lens, cu_seqlens_q, first_seq, num_kv_heads, group, max_splits,
    window, out_stride,
    QUERIES: tl.constexpr, ROOM: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, FP8: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join the splits of each row. Grid (ROOM * group, num_kv_heads, num_seqs)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    begin = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - begin
    context = tl.load(context_lens + seq)
    query = row // group
    if (num_new <= QUERIES) & (query < num_new):
        first = 0
        if WINDOWED:
            first = tl.maximum(context - num_new - window + 1, 0) // SPLIT
        stop = tl.cdiv(context, SPLIT)
        half = tl.arange(0, HALF)
        base = (tl.program_id(2).to(tl.int64) * num_kv_heads + head) * max_splits
        group_rows = ROOM * group
        top = -float("inf")
        # From a multiple of AT_ONCE: the sums' order is then the same for any window.
        begin_at = first // AT_ONCE * AT_ONCE
        for start in range(begin_at, stop, AT_ONCE):
            split = start + tl.arange(0, AT_ONCE)
            there = (split >= first) & (split < stop)
            at = (base + split) * group_rows + row
            largest = tl.load(stats + at * 2, mask=there, other=float("-inf"))
            top = tl.maximum(top, tl.max(largest, 0))
        top = tl.where(top == float("-inf"), 0.0, top)  # padding, which sees nothing
        acc0 = tl.zeros([HALF], tl.float32)
        acc1 = tl.zeros([HALF], tl.float32)
        total = 0.0
        for start in range(begin_at, stop, AT_ONCE):
            split = start + tl.arange(0, AT_ONCE)
            there = (split >= first) & (split < stop)
            at = (base + split) * group_rows + row
            share = tl.exp2(tl.load(stats + at * 2, mask=there, other=float("-inf")) - top)
            sums = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
            of_part = partial + at[:, None] * (2 * HALF) + half[None, :]
            values0 = tl.load(of_part, mask=there[:, None], other=0.0)
            values1 = tl.load(of_part + HALF, mask=there[:, None], other=0.0)
            total += tl.sum(share * sums, 0)
            acc0 += tl.sum(values0 * share[:, None], 0)
            acc1 += tl.sum(values1 * share[:, None], 0)
        total = tl.where(total == 0.0, 1.0, total)
        to = out + (begin + query).to(tl.int64) * out_stride
        to += (head * group + row % group) * HEAD_DIM
        DTYPE: tl.constexpr = out.dtype.element_ty
        there = half < HEAD_DIM // 2
        tl.store(to + dimension(half, 0, HEAD_DIM, FP8), (acc0 / total).to(DTYPE), mask=there)
        tl.store(to + dimension(half, 1, HEAD_DIM, FP8), (acc1 / total).to(DTYPE), mask=there)


@triton.jit(do_not_specialize=[*VARYING, "num_seqs"])
def chunk_kernel(
    out, q, k_cache, v_cache, k_scales, v_scales, block_tables, context_lens, cu_seqlens_q,
    num_seqs, table_width, num_kv_heads, group, window, scale, q_stride, out_stride,
    QUERIES: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sequences of more than QUERIES new tokens. Grid (tiles, num_kv_heads).

    A tile holds ROWS // group tokens. Sequence i's tiles begin at
    cu_seqlens_q[i] // that + i: a few are empty, and no one needs to know how many there are.
    """
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens have the most keys: first
    tokens = ROWS // group
    lo = 0
    hi = num_seqs
    while hi - lo > 1:
        middle = (lo + hi) // 2
        is_before = tl.load(cu_seqlens_q + middle) // tokens + middle <= tile
        lo = tl.where(is_before, middle, lo)
        hi = tl.where(is_before, hi, middle)
    seq = lo
    begin = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - begin
    first_query = (tile - begin // tokens - seq) * tokens
    if (num_new > QUERIES) & (first_query < num_new):
        context = tl.load(context_lens + seq)
        row = tl.arange(0, ROWS)
        query = first_query + row // group
        position = context - num_new + query
        oldest = tl.where(WINDOWED, position - window + 1, 0)
        half = tl.arange(0, HALF)
        is_row = (row < tokens * group) & (query < num_new)
        there = is_row[:, None] & (half < HEAD_DIM // 2)[None, :]
        token = (begin + query).to(tl.int64)
        of_head = (head * group + row % group) * HEAD_DIM
        part0 = dimension(half, 0, HEAD_DIM, FP8)[None, :]
        part1 = dimension(half, 1, HEAD_DIM, FP8)[None, :]
        at = (token * q_stride + of_head)[:, None]
        rows0 = tl.load(q + at + part0, mask=there, other=0.0).to(DTYPE)
        rows1 = tl.load(q + at + part1, mask=there, other=0.0).to(DTYPE)
        start = 0
        if WINDOWED:
            start = tl.maximum(context - num_new + first_query - window + 1, 0) // KEYS * KEYS
        stop = context - num_new + tl.minimum(first_query + tokens, num_new)
        table = block_tables + tl.cast(seq, tl.int64) * table_width
        acc0, acc1, _, total = _attend(
            rows0, rows1, position, oldest, k_cache, v_cache, k_scales, v_scales,
            table, start, stop, head, num_kv_heads, scale, HEAD_DIM, HALF, BLOCK_SIZE, KEYS, FP8,
            DTYPE, PRECISION, ASM,
        )  # fmt: skip
        total = tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + (token * out_stride + of_head)[:, None]
        tl.store(to + part0, (acc0 / total).to(out.dtype.element_ty), mask=there)
        tl.store(to + part1, (acc1 / total).to(out.dtype.element_ty), mask=there)
