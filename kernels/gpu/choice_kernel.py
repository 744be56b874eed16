"""Triton kernels that choose tokens; kernels/choice.py says what, choice.py here launches them.

A row's tokens lie in columns, as in kernels/truncation.py: token i is member i // w of column
i % w, w being vocab_size // 128, and the last vocab_size % 128 tokens are columns of their own. A
program of the first two kernels has a split, COLUMNS columns, so that a row is worked on by as many
programs as it has splits; the number of splits depends on the vocabulary only, and so does every
sum's order.

scan_kernel    penalties, additions and mask; each split's largest logit, what is not finite; where
               asked, the sum of exponentials and each column's largest of the logits as they came.
               Of rows that draw, logits over temperature, split by split.
weigh_kernel   of those: the sums of weights, exp(logit - largest), and the weights that truncation
               may keep, packed together.
choose_kernel  one program a row: the largest, or truncation's bound and the draw; counts it.
report_kernel  one program a row that asked: log-probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import choice
from kernels.sampling import GOLDEN_GAMMA, GREEDY_BELOW, MIX_1, MIX_2
from kernels.truncation import NUM_MEMBERS

TEMPERATURE = tl.constexpr(choice.FLOATS.index("temperature"))
MIN_P = tl.constexpr(choice.FLOATS.index("min_p"))
TOP_P = tl.constexpr(choice.FLOATS.index("top_p"))
REPETITION = tl.constexpr(choice.FLOATS.index("repetition"))
PRESENCE = tl.constexpr(choice.FLOATS.index("presence"))
FREQUENCY = tl.constexpr(choice.FLOATS.index("frequency"))
TOP_K = tl.constexpr(choice.INTS.index("top_k"))
COUNTS = tl.constexpr(choice.INTS.index("counts"))
IS_COUNTED = tl.constexpr(choice.INTS.index("is_counted"))
MASK = tl.constexpr(choice.INTS.index("mask"))
LOGPROBS = tl.constexpr(choice.INTS.index("logprobs"))
ADDITIONS = tl.constexpr(choice.INTS.index("additions"))
DRAFTS = tl.constexpr(choice.INTS.index("drafts"))
MAX_COUNT = tl.constexpr(choice.MAX_COUNT)
NO_TOKEN = tl.constexpr(choice.NO_TOKEN)
BROKEN = tl.constexpr(choice.BROKEN)
COLDEST = tl.constexpr(GREEDY_BELOW)
MEMBERS = tl.constexpr(NUM_MEMBERS)
GAMMA, FIRST_FACTOR, SECOND_FACTOR = (tl.constexpr(x) for x in (GOLDEN_GAMMA, MIX_1, MIX_2))

ROWS = ["num_rows"]
ROWS_AND_TOP = ["num_rows", "num_top"]
"""Arguments whose value must not cause another compilation while requests wait."""


@triton.jit
def _tile(split, vocab_size, COLUMNS: tl.constexpr):
    """Tokens [MEMBERS, COLUMNS] of a split, and which of them there are."""
    num_columns = vocab_size // MEMBERS
    column = split * COLUMNS + tl.arange(0, COLUMNS)
    member = tl.arange(0, MEMBERS)
    is_alone = (column >= num_columns)[None, :]
    token = column[None, :] + tl.where(is_alone, MEMBERS - 1, member[:, None]) * num_columns
    return token, (token < vocab_size) & ((member == 0)[:, None] | (is_alone == 0))


@triton.jit
def _changed(
    raw, token, there, row, floats, ints, positions, counts, addition_ids, amounts, until,
    draft_ids, bitmask, num_rows, vocab_size,
):  # fmt: skip
    """Logits after penalties, additions and mask; minus infinity where there is no token."""
    x = raw
    place = tl.load(ints + COUNTS * num_rows + row)
    if place >= 0:
        seen = tl.load(counts + place.to(tl.int64) * vocab_size + token, mask=there, other=0)
        seen = seen.to(tl.int32)
        count = seen & MAX_COUNT
        first = tl.load(ints + DRAFTS * num_rows + row)
        end = tl.load(ints + (DRAFTS + 1) * num_rows + row)
        for i in range(first, end):
            count += (token == tl.load(draft_ids + i)).to(tl.int32)
        repetition = tl.load(floats + REPETITION * num_rows + row) + tl.zeros_like(x)
        y = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        y = y - tl.load(floats + FREQUENCY * num_rows + row) * count.to(tl.float32)
        y = y - tl.where(count > 0, tl.load(floats + PRESENCE * num_rows + row), 0.0)
        x = tl.where((seen != 0) | (count > 0), y, x)
    first = tl.load(ints + ADDITIONS * num_rows + row)
    end = tl.load(ints + (ADDITIONS + 1) * num_rows + row)
    if first < end:
        position = tl.load(positions + row)
        for i in range(first, end):
            amount = tl.where(position < tl.load(until + i), tl.load(amounts + i), 0.0)
            x = tl.where(token == tl.load(addition_ids + i), x + amount, x)
    mask = tl.load(ints + MASK * num_rows + row)
    if mask >= 0:
        num_words = (vocab_size + 31) // 32
        at = bitmask + mask.to(tl.int64) * num_words + token // 32
        word = tl.load(at, mask=there, other=0)
        x = tl.where(((word >> (token % 32)) & 1) == 0, float("-inf"), x)
    return tl.where(there, x, float("-inf"))


@triton.jit
def _place(COLUMNS: tl.constexpr):
    """Where a split keeps its tokens: [MEMBERS, COLUMNS], one member after the other."""
    return tl.arange(0, MEMBERS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit(do_not_specialize=ROWS)
def scan_kernel(
    logits, floats, ints, positions, counts, addition_ids, amounts, until, draft_ids, bitmask,
    scaled, largest, largest_id, is_broken, column_largest, raw_largest, raw_sum, raw_column,
    raw_column_id, num_rows, vocab_size, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows, num_splits).

    scaled: [num_rows, num_splits, MEMBERS * COLUMNS];
    largest, largest_id, is_broken, raw_largest, raw_sum: [num_rows, num_splits];
    column_largest: [num_rows, num_splits * COLUMNS];
    raw_column, raw_column_id: [num_reported, num_splits * COLUMNS].
    """
    row, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token, there = _tile(split, vocab_size, COLUMNS)
    raw = tl.load(logits + row.to(tl.int64) * vocab_size + token, mask=there, other=0.0)
    to = row * num_splits + split
    broken = tl.max(tl.max((tl.abs(raw) < float("inf")).to(tl.int32) ^ 1, 0), 0)
    tl.store(is_broken + to, broken)
    x = _changed(
        raw, token, there, row, floats, ints, positions, counts, addition_ids, amounts, until,
        draft_ids, bitmask, num_rows, vocab_size,
    )  # fmt: skip
    temperature = tl.load(floats + TEMPERATURE * num_rows + row)
    if temperature >= COLDEST:
        x = tl.div_rn(x, temperature + tl.zeros_like(x))
        tl.store(scaled + to.to(tl.int64) * (MEMBERS * COLUMNS) + _place(COLUMNS), x)
    of_columns = tl.max(x, 0)
    best = tl.max(of_columns, 0)
    tl.store(largest + to, best)
    tl.store(largest_id + to, tl.min(tl.min(tl.where(x == best, token, vocab_size), 0), 0))
    column = split * COLUMNS + tl.arange(0, COLUMNS)
    if tl.load(ints + TOP_K * num_rows + row) > 0:
        tl.store(column_largest + row * num_splits * COLUMNS + column, of_columns)
    place = tl.load(ints + LOGPROBS * num_rows + row)
    if place >= 0:
        known = tl.where(there, raw, float("-inf"))
        highest = tl.max(tl.max(known, 0), 0)
        tl.store(raw_largest + to, highest)
        tl.store(raw_sum + to, tl.sum(tl.sum(tl.exp(known - highest), 0), 0))
        own = place * num_splits * COLUMNS + column
        tl.store(raw_column + own, tl.max(known, 0))
        ids = tl.min(tl.where(known == tl.max(known, 0)[None, :], token, vocab_size), 0)
        tl.store(raw_column_id + own, ids)


@triton.jit
def _row_largest(largest, is_broken, row, num_splits, SPLITS: tl.constexpr):
    """A row's largest logit; infinity where it is broken."""
    split = tl.arange(0, SPLITS)
    of_splits = tl.load(
        largest + row * num_splits + split, mask=split < num_splits, other=float("-inf")
    )
    broken = tl.load(is_broken + row * num_splits + split, mask=split < num_splits, other=0)
    return tl.where(tl.max(broken, 0) > 0, float("inf"), tl.max(of_splits, 0))


@triton.jit
def column_sums(tile, COLUMNS: tl.constexpr):
    """float32 [COLUMNS] of [MEMBERS, COLUMNS]: halves are added to each other, as sum_columns does.
    Only pairs are summed, so in the same order."""
    tile = tl.sum(tile.reshape([2, MEMBERS // 2, COLUMNS]), 0)
    tile = tl.sum(tile.reshape([2, MEMBERS // 4, COLUMNS]), 0)
    tile = tl.sum(tile.reshape([2, MEMBERS // 8, COLUMNS]), 0)
    tile = tl.sum(tile.reshape([2, MEMBERS // 16, COLUMNS]), 0)
    tile = tl.sum(tile.reshape([2, MEMBERS // 32, COLUMNS]), 0)
    tile = tl.sum(tile.reshape([2, MEMBERS // 64, COLUMNS]), 0)
    return tl.sum(tile, 0)


@triton.jit
def _lower_bound(
    column_largest, row, top, min_p, top_k, top_p, num_splits, vocab_size,
    COLUMNS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A weight below which truncation keeps none; 0 where it may keep all.

    Top-k: the k-th largest of the columns' largest weights, in its first 16 bits. Top-p: the set
    may leave out 1 - p of a sum that is at least the largest weight, 1; half of that is more than
    all the weights below the bound.
    """
    bound = min_p
    if top_k > 0:
        column = tl.arange(0, ALL_COLUMNS)
        there = column < num_splits * COLUMNS
        x = tl.load(
            column_largest + row * num_splits * COLUMNS + column, mask=there, other=float("-inf")
        )
        bits = tl.exp(x - top).to(tl.int32, bitcast=True)
        base = tl.full([], 0, tl.int32)
        for step in range(14):
            candidate = base + (1 << (29 - step))
            if tl.sum((bits >= candidate).to(tl.int32), 0) >= top_k:
                base = candidate
        bound = tl.maximum(bound, base.to(tl.float32, bitcast=True))
    elif (min_p <= 0) & (top_p < 1):
        bound = (1 - top_p) / (2 * vocab_size)
    return bound


@triton.jit(do_not_specialize=ROWS)
def weigh_kernel(
    floats, ints, scaled, largest, is_broken, column_largest, sums, packed, num_packed, num_rows,
    vocab_size, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows, num_splits); greedy rows have nothing to do.

    sums: float64 [num_rows, num_splits], of all weights; packed: [num_rows, num_splits,
    MEMBERS * COLUMNS], of rows that are truncated in its first num_packed [num_rows, num_splits]
    places the weights that reach the bound.
    """
    row, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    SIZE: tl.constexpr = MEMBERS * COLUMNS
    temperature = tl.load(floats + TEMPERATURE * num_rows + row)
    top = _row_largest(largest, is_broken, row, num_splits, SPLITS)
    if (temperature >= COLDEST) & (tl.abs(top) < float("inf")):
        to = row * num_splits + split
        weights = tl.exp(tl.load(scaled + to.to(tl.int64) * SIZE + _place(COLUMNS)) - top)
        tl.store(sums + to, tl.sum(column_sums(weights, COLUMNS).to(tl.float64), 0))
        min_p = tl.load(floats + MIN_P * num_rows + row)
        top_k = tl.load(ints + TOP_K * num_rows + row)
        top_p = tl.load(floats + TOP_P * num_rows + row)
        top_k = tl.where(top_k < vocab_size, top_k, 0)
        if (min_p > 0) | (top_k > 0) | (top_p < 1):
            bound = _lower_bound(
                column_largest, row, top, min_p, top_k, top_p, num_splits, vocab_size, COLUMNS,
                SPLITS * COLUMNS,
            )  # fmt: skip
            flat = tl.reshape(weights, [SIZE])
            is_kept = (flat >= bound).to(tl.int32)
            place = tl.cumsum(is_kept, 0) - 1
            tl.store(packed + to.to(tl.int64) * SIZE + place, flat, mask=is_kept > 0)
            tl.store(num_packed + to, tl.sum(is_kept, 0))


@triton.jit
def _packed_tile(
    packed, lengths, start, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """[SPLITS, WIDTH]: some packed weights of each split, from the one numbered start on."""
    split, place = tl.arange(0, SPLITS), start + tl.arange(0, WIDTH)
    return tl.load(
        packed + split[:, None] * SIZE + place[None, :],
        mask=place[None, :] < lengths[:, None], other=0.0,
    )  # fmt: skip


@triton.jit
def _kth_largest(packed, lengths, k, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """The largest number that k weights reach, bit by bit: weights compare as their bits do."""
    base = tl.full([], 0, tl.int32)
    most = tl.max(lengths, 0)
    for step in range(15):
        shift = 28 - 2 * step
        one = tl.zeros([SPLITS, WIDTH], tl.int32)
        two = tl.zeros([SPLITS, WIDTH], tl.int32)
        three = tl.zeros([SPLITS, WIDTH], tl.int32)
        for start in range(0, most, WIDTH):
            bits = _packed_tile(packed, lengths, start, SPLITS, WIDTH, SIZE)
            bits = bits.to(tl.int32, bitcast=True)
            one += (bits >= base + (1 << shift)).to(tl.int32)
            two += (bits >= base + (2 << shift)).to(tl.int32)
            three += (bits >= base + (3 << shift)).to(tl.int32)
        digit = (tl.sum(tl.sum(one, 1), 0) >= k).to(tl.int32)
        digit += (tl.sum(tl.sum(two, 1), 0) >= k).to(tl.int32)
        digit += (tl.sum(tl.sum(three, 1), 0) >= k).to(tl.int32)
        base += digit << shift
    return base.to(tl.float32, bitcast=True)


@triton.jit
def _share_floor(
    packed, lengths, target, floor, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """The largest number such that the weights that reach it and the floor sum up to target."""
    base = tl.full([], 0, tl.int32)
    most = tl.max(lengths, 0)
    for step in range(15):
        shift = 28 - 2 * step
        one = tl.zeros([SPLITS, WIDTH], tl.float64)
        two = tl.zeros([SPLITS, WIDTH], tl.float64)
        three = tl.zeros([SPLITS, WIDTH], tl.float64)
        for start in range(0, most, WIDTH):
            weights = _packed_tile(packed, lengths, start, SPLITS, WIDTH, SIZE)
            weights = tl.where(weights >= floor, weights, 0.0)
            bits = weights.to(tl.int32, bitcast=True)
            wide = weights.to(tl.float64)
            one += tl.where(bits >= base + (1 << shift), wide, 0.0)
            two += tl.where(bits >= base + (2 << shift), wide, 0.0)
            three += tl.where(bits >= base + (3 << shift), wide, 0.0)
        digit = (tl.sum(tl.sum(one, 1), 0) >= target).to(tl.int32)
        digit += (tl.sum(tl.sum(two, 1), 0) >= target).to(tl.int32)
        digit += (tl.sum(tl.sum(three, 1), 0) >= target).to(tl.int32)
        base += digit << shift
    return base.to(tl.float32, bitcast=True)


@triton.jit
def _kept_sums(
    packed, lengths, floor, SPLITS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """float64 [SPLITS]: of the weights that reach the floor."""
    sums = tl.zeros([SPLITS, WIDTH], tl.float64)
    for start in range(0, tl.max(lengths, 0), WIDTH):
        weights = _packed_tile(packed, lengths, start, SPLITS, WIDTH, SIZE)
        sums += tl.where(weights >= floor, weights, 0.0).to(tl.float64)
    return tl.sum(sums, 1)


@triton.jit
def _mix(x):
    """SplitMix64's finaliser; shifts are logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST_FACTOR
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND_FACTOR
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _uniform(seed, position):
    """float64: uniform of kernels/sampling.py, to the bit."""
    x = _mix(_mix(seed + GAMMA) + (position + 1) * GAMMA)
    return ((x >> 11) & ((1 << 53) - 1)).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _find(sums, target, SIZE: tl.constexpr):
    """The last place that has a weight and begins at or before the target, and how far into it
    that lies. No other order of sums can make it a place without weight."""
    place = tl.arange(0, SIZE)
    starts = tl.cumsum(sums, 0) - sums
    found = tl.max(tl.where((sums > 0) & (starts <= target), place, -1), 0)
    found = tl.maximum(found, 0)
    start = tl.sum(tl.where(place == found, starts, 0.0), 0)
    return found, tl.maximum(target - start, 0.0)


@triton.jit
def _highest(largest, largest_id, row, num_splits, vocab_size, SPLITS: tl.constexpr):
    """The largest logit's token, the lowest id of equals."""
    split = tl.arange(0, SPLITS)
    at = row * num_splits + split
    of_splits = tl.load(largest + at, mask=split < num_splits, other=float("-inf"))
    ids = tl.load(largest_id + at, mask=split < num_splits, other=vocab_size)
    return tl.min(tl.where(of_splits == tl.max(of_splits, 0), ids, vocab_size), 0)


@triton.jit
def _truncated(
    floats, ints, sums, packed, num_packed, row, num_rows, vocab_size, num_splits,
    SPLITS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The least weight that may be drawn, and the splits' sums of those: float64 [SPLITS]."""
    split = tl.arange(0, SPLITS)
    there = split < num_splits
    at = row * num_splits + split
    kept = tl.load(sums + at, mask=there, other=0.0)
    floor = tl.load(floats + MIN_P * num_rows + row)
    top_k = tl.load(ints + TOP_K * num_rows + row)
    top_k = tl.where(top_k < vocab_size, top_k, 0)
    top_p = tl.load(floats + TOP_P * num_rows + row)
    if (floor > 0) | (top_k > 0) | (top_p < 1):
        lengths = tl.load(num_packed + at, mask=there, other=0)
        own = packed + (row * num_splits).to(tl.int64) * SIZE
        if top_k > 0:
            floor = tl.maximum(floor, _kth_largest(own, lengths, top_k, SPLITS, WIDTH, SIZE))
        if top_p < 1:
            if floor > 0:  # else some of all are not packed
                kept = _kept_sums(own, lengths, floor, SPLITS, WIDTH, SIZE)
            target = top_p.to(tl.float64) * tl.sum(kept, 0)
            share = _share_floor(own, lengths, target, floor, SPLITS, WIDTH, SIZE)
            floor = tl.maximum(floor, share)
        if floor > 0:
            kept = _kept_sums(own, lengths, floor, SPLITS, WIDTH, SIZE)
    return floor, kept


@triton.jit(do_not_specialize=ROWS)
def choose_kernel(
    token_ids, floats, ints, seeds, positions, counts, scaled, largest, largest_id, is_broken, sums,
    packed, num_packed, num_rows, vocab_size, num_splits,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows); token_ids int64 [num_rows]."""
    row = tl.program_id(0)
    temperature = tl.load(floats + TEMPERATURE * num_rows + row)
    top = _row_largest(largest, is_broken, row, num_splits, SPLITS)
    chosen = tl.full([], NO_TOKEN, tl.int32)
    if top == float("inf"):
        chosen = tl.full([], BROKEN, tl.int32)
    elif top > float("-inf"):
        if temperature < COLDEST:
            chosen = _highest(largest, largest_id, row, num_splits, vocab_size, SPLITS)
        else:
            floor, of_splits = _truncated(
                floats, ints, sums, packed, num_packed, row, num_rows, vocab_size,
                num_splits, SPLITS, WIDTH, MEMBERS * COLUMNS,
            )  # fmt: skip
            noise = _uniform(tl.load(seeds + row), tl.load(positions + row))
            split, target = _find(of_splits, noise * tl.sum(of_splits, 0), SPLITS)
            own = (row * num_splits + split).to(tl.int64) * (MEMBERS * COLUMNS)
            weights = tl.exp(tl.load(scaled + own + _place(COLUMNS)) - top)
            weights = tl.where(weights >= floor, weights, 0.0)
            of_columns = column_sums(weights, COLUMNS).to(tl.float64)
            column, target = _find(of_columns, target, COLUMNS)
            is_own = (tl.arange(0, COLUMNS) == column)[None, :]
            of_members = tl.sum(tl.where(is_own, weights, 0.0), 1).to(tl.float64)
            member, target = _find(of_members, target, MEMBERS)
            token, there = _tile(split, vocab_size, COLUMNS)
            is_own = is_own & (tl.arange(0, MEMBERS) == member)[:, None] & there
            chosen = tl.max(tl.max(tl.where(is_own, token, 0), 0), 0)
    tl.store(token_ids + row, chosen.to(tl.int64))
    if (chosen >= 0) & (tl.load(ints + IS_COUNTED * num_rows + row) > 0):
        place = tl.load(ints + COUNTS * num_rows + row).to(tl.int64)
        count = tl.load(counts + place * vocab_size + chosen)
        is_full = (count.to(tl.int32) & MAX_COUNT) == MAX_COUNT
        tl.store(counts + place * vocab_size + chosen, tl.where(is_full, count, count + 1))


@triton.jit(do_not_specialize=ROWS_AND_TOP)
def report_kernel(
    logprobs, top_logprobs, top_ids, logits, ints, token_ids, raw_largest, raw_sum, raw_column,
    raw_column_id, num_rows, num_top, vocab_size, num_splits,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (num_rows); only rows that asked do anything. Outputs as in Chosen.

    The most likely tokens are found one after the other: the largest of the columns' largest,
    whose column then gives its next one. Of equals the lowest token id comes first.
    """
    row = tl.program_id(0)
    place = tl.load(ints + LOGPROBS * num_rows + row)
    if place >= 0:
        split = tl.arange(0, SPLITS)
        there = split < num_splits
        at = row * num_splits + split
        of_splits = tl.load(raw_largest + at, mask=there, other=float("-inf"))
        best = tl.max(of_splits, 0)
        parts = tl.load(raw_sum + at, mask=there, other=0.0) * tl.exp(of_splits - best)
        log_sum = tl.log(tl.sum(parts, 0))
        logits += row.to(tl.int64) * vocab_size
        chosen = tl.maximum(tl.load(token_ids + row), 0)
        tl.store(logprobs + place, tl.load(logits + chosen) - best - log_sum)
        column = tl.arange(0, SPLITS * COLUMNS)
        num_all = num_splits * COLUMNS
        at = place * num_all + column
        values = tl.load(raw_column + at, mask=column < num_all, other=float("-inf"))
        ids = tl.load(raw_column_id + at, mask=column < num_all, other=vocab_size)
        num_columns = vocab_size // MEMBERS
        for i in range(num_top):
            value = tl.max(values, 0)
            token = tl.min(tl.where(values == value, ids, vocab_size), 0)
            tl.store(top_logprobs + place * num_top + i, value - best - log_sum)
            tl.store(top_ids + place * num_top + i, token.to(tl.int64))
            is_own = ids == token
            own = token - (MEMBERS - 1) * num_columns
            if token < num_columns * MEMBERS:
                own = token % num_columns
            members = own + tl.arange(0, MEMBERS) * num_columns
            x = tl.load(
                logits + members, mask=(own < num_columns) & (members < vocab_size),
                other=float("-inf"),
            )  # fmt: skip
            is_left = (x < value) | ((x == value) & (members > token))
            x = tl.where(is_left, x, float("-inf"))
            value = tl.max(x, 0)
            values = tl.where(is_own, value, values)
            next_id = tl.min(tl.where(is_left & (x == value), members, vocab_size), 0)
            ids = tl.where(is_own, next_id, ids)
