"""Causal attention over a paged KV cache; prompt chunks and single tokens in one flat batch.

An 8-bit cache has its scales beside it (kernels/fp8_cache.py), passed as kv_scales; its operations
are dispatched under names of their own, so that an implementation knows what it gets.

Numerics: scores, softmax and sums in float32, rounded once to q's dtype.
A row's bits depend on its own query and keys alone: not on the rest of the batch, nor on the blocks
that hold the keys, nor on whether it is decoded or part of a prompt chunk. For that, every product
has one shape, [rows of a tile, head_dim, KV_SPLIT], and the splits, counted from position 0 of the
sequence, are joined one after another by a running softmax.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from kernels.dispatch import check, dispatch
from kernels.fp8_cache import check_kv_scales, read_codes, write_fp8_cache_reference

KV_SPLIT = 256
"""Key positions in one product."""
TILE_ROWS = 4
"""A tile's rows are a few queries times the query heads that share a kv head, then zeros up to a
multiple of this. With other numbers of rows, and of columns (next line), MKL's sums depend on how
many threads take part."""
HEAD_DIM_MULTIPLE = 16
CHUNK_QUERIES = 128
"""Queries of one prompt chunk handled at a time."""
MAX_ELEMENTS = 1 << 19
"""Elements of a temporary at most, where there is a choice: 2 MB of float32 stay in cache."""
NOTHING_SEEN = -1e30
"""Running maximum before a row's first key: finite, as infinities must not meet in a difference."""

MAX_SPLIT_QUERIES = 16
"""On a GPU: new tokens of a sequence that is read in splits, at most; a decode, or one with drafts.
With more it is a prompt chunk."""
MAX_WORKSPACE_BYTES = 256 * 2**20
"""On a GPU: of the splits' results; sequences that need more together run in several launches."""

KVScales = tuple[Tensor, Tensor]


def split_workspace_bytes(
    num_seqs: int, num_queries: int, *, num_heads: int, head_dim: int, max_len: int
) -> int:
    """What a GPU needs between reading the splits and joining them.

    Args:
        num_queries: new tokens of a sequence at most, up to MAX_SPLIT_QUERIES.
        max_len: keys that the block tables have room for.
    """
    width = max(32, 1 << (head_dim - 1).bit_length())
    num_rows = -(-max_len // KV_SPLIT) * min(num_queries, MAX_SPLIT_QUERIES) * num_heads
    per_seq = 4 * num_rows * (width + 2)
    return per_seq * min(num_seqs, max(1, MAX_WORKSPACE_BYTES // per_seq))


def write_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Store this step's keys and values in their slots, rounded to the cache's dtype.

    Args:
        k, v:             [num_tokens, num_kv_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping:     int64 [num_tokens], block_id * block_size + offset; -1 = do not store.
        kv_scales:        of an 8-bit cache, uint8 [num_blocks, block_size, num_kv_heads] each:
                          written too.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(v.shape == k.shape, "v.shape", tuple(k.shape), tuple(v.shape))
    _check_caches(k_cache, v_cache)
    heads = tuple(k_cache.shape[2:])
    check(k.shape[1:] == heads, "k.shape[1:]", heads, tuple(k.shape[1:]))
    check(len(slot_mapping) == len(k), "len(slot_mapping)", len(k), len(slot_mapping))
    check_kv_scales(k_cache, v_cache, kv_scales)
    arguments = k, v, k_cache, v_cache, slot_mapping
    if kv_scales is None:
        dispatch("write_kv_cache", write_kv_cache_reference, *arguments)
    else:
        dispatch("write_fp8_cache", write_fp8_cache_reference, *arguments, kv_scales)


def write_kv_cache_reference(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """write_kv_cache in plain PyTorch."""
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v.to(v_cache.dtype))


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    check(k_cache.dim() == 4, "k_cache.dim()", 4, k_cache.dim())
    shape = tuple(k_cache.shape)
    check(v_cache.shape == shape, "v_cache.shape", shape, tuple(v_cache.shape))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Attend each new token to the cached keys of its sequence up to its own position.

    Query i of a sequence with n new tokens and context length c sits at position c - n + i. It sees
    the keys at its position and before; with a sliding window, the last `sliding_window` of them.

    Args:
        q:                [num_tokens, num_heads, head_dim], sequence after sequence.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], any float dtype; each kv
                          head serves num_heads / num_kv_heads consecutive query heads.
        block_tables:     int32 [num_seqs, max_num_blocks], padded with -1.
        context_lens:     int32 [num_seqs], this step's tokens included: they are cached already.
                          0 with one new token is padding, whose result means nothing.
        cu_seqlens_q:     int32 [num_seqs + 1], prefix sums of new tokens, at least one each.
        scale:            multiplies the scores, usually head_dim ** -0.5.
        sliding_window:   tokens, or None.
        kv_scales:        as write_kv_cache's.

    Returns:
        q's shape and dtype.

    Raises:
        ValueError: shapes disagree, or the window is not positive.
    """
    num_seqs = len(context_lens)
    _check_caches(k_cache, v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    check(q.dim() == 3, "q.dim()", 3, q.dim())
    check(q.shape[2] == head_dim, "q.shape[2]", head_dim, q.shape[2])
    is_multiple = q.shape[1] % num_kv_heads == 0
    check(is_multiple, "q.shape[1]", f"a multiple of {num_kv_heads}", q.shape[1])
    check(len(block_tables) == num_seqs, "len(block_tables)", num_seqs, len(block_tables))
    check(len(cu_seqlens_q) == num_seqs + 1, "len(cu_seqlens_q)", num_seqs + 1, len(cu_seqlens_q))
    positive_window = sliding_window is None or sliding_window > 0
    check(positive_window, "sliding_window", "a positive number or None", sliding_window)
    check_kv_scales(k_cache, v_cache, kv_scales)
    arguments = (
        q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, sliding_window,
    )  # fmt: skip
    if kv_scales is None:
        return dispatch("paged_attention", paged_attention_reference, *arguments)
    return dispatch("paged_attention_fp8", paged_attention_reference, *arguments, kv_scales)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """paged_attention in plain PyTorch: several decodes at a time, prompt chunks one by one."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    group = q.shape[1] // num_kv_heads
    queries = q.view(len(q), num_kv_heads, group, head_dim)
    out = torch.zeros(queries.shape, dtype=q.dtype, device=q.device)
    bounds, lens = cu_seqlens_q.tolist(), context_lens.tolist()
    num_new = [stop - start for start, stop in pairwise(bounds)]

    def visible(positions: list[tuple[int, int]]) -> Tensor:
        """Positions that the queries from the first to the last of a sequence may see."""
        reach = sliding_window or 1 << 62
        limits = [(max(0, first - reach + 1), last) for first, last in positions]
        return torch.tensor(limits, device=q.device)

    decodes = [seq for seq, n in enumerate(num_new) if n == 1 and lens[seq]]
    decodes.sort(key=lambda seq: lens[seq])
    seqs_at_once = max(1, MAX_ELEMENTS // (num_kv_heads * KV_SPLIT * head_dim))
    for i in range(0, len(decodes), seqs_at_once):
        seqs = decodes[i : i + seqs_at_once]
        tokens = [bounds[seq] for seq in seqs]
        limits = visible([(lens[seq] - 1, lens[seq] - 1) for seq in seqs])
        attended = _attend(
            queries[tokens][:, :, None],  # [num_seqs, num_kv_heads, 1 tile, group, head_dim]
            limits[:, 1].view(-1, 1, 1, 1, 1),
            limits, k_cache, v_cache, block_tables[seqs], scale, sliding_window, kv_scales,
        )  # fmt: skip
        out[tokens] = attended[:, :, 0]

    tile = max(1, TILE_ROWS // group)  # queries in a tile
    heads_at_once = max(1, MAX_ELEMENTS // (CHUNK_QUERIES * group * KV_SPLIT))
    for seq in (seq for seq, n in enumerate(num_new) if n > 1):
        for start in range(bounds[seq], bounds[seq + 1], CHUNK_QUERIES):
            num_queries = min(CHUNK_QUERIES, bounds[seq + 1] - start)
            num_tiles = -(-num_queries // tile)
            first = lens[seq] - bounds[seq + 1] + start  # position of the first query
            positions = torch.arange(first, first + num_tiles * tile, device=q.device)
            positions = positions.repeat_interleave(group).view(1, 1, num_tiles, tile * group, 1)
            limits = visible([(first, first + num_queries - 1)])
            missing = (0, 0) * 3 + (0, num_tiles * tile - num_queries)
            tiles = functional.pad(queries[start : start + num_queries], missing)
            tiles = tiles.view(num_tiles, tile, num_kv_heads, group, head_dim)
            tiles = tiles.permute(2, 0, 1, 3, 4).flatten(2, 3)
            for head in range(0, num_kv_heads, heads_at_once):
                heads = slice(head, head + heads_at_once)
                attended = _attend(
                    tiles[None, heads],  # [1 sequence, heads, num_tiles, tile * group, head_dim]
                    positions, limits, k_cache[:, :, heads], v_cache[:, :, heads],
                    block_tables[seq : seq + 1], scale, sliding_window,
                    kv_scales and (kv_scales[0][:, :, heads], kv_scales[1][:, :, heads]),
                )  # fmt: skip
                by_query = attended.reshape(-1, num_tiles * tile, group, head_dim)[:, :num_queries]
                out[start : start + num_queries, heads] = by_query.transpose(0, 1)
    return out.flatten(1, 2)


def _attend(
    rows: Tensor,
    positions: Tensor,
    limits: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    scale: float,
    sliding_window: int | None,
    kv_scales: KVScales | None,
) -> Tensor:
    """Attend tiles of rows; all tiles of a sequence share the keys gathered for it.

    Args:
        rows:      [num_seqs, num_kv_heads, num_tiles, rows, head_dim].
        positions: int64, each row's, with dimensions of 1 where they are all the same.
        limits:    int64 [num_seqs, 2]: first and last position that any row of a sequence sees.

    Returns:
        rows' shape and dtype.
    """
    num_rows, head_dim = rows.shape[3:]
    padding = (0, -head_dim % HEAD_DIM_MULTIPLE, 0, -num_rows % TILE_ROWS)
    queries = functional.pad(rows.float() * scale, padding)
    if positions.shape[3] > 1:
        positions = functional.pad(positions, (0, 0, *padding[2:]))
    acc = torch.zeros_like(queries)
    running_max = acc.new_full((*acc.shape[:4], 1), NOTHING_SEEN)
    running_sum = torch.zeros_like(running_max)
    first, last = limits[:, :1], limits[:, 1:]
    block_size = k_cache.shape[1]
    start, stop = int(first.min()), int(last.max()) + 1
    for split in range(start - start % KV_SPLIT, stop, KV_SPLIT):
        key_positions = torch.arange(split, split + KV_SPLIT, device=rows.device)
        # At positions that no row sees, a key in sight is read again: other slots may hold NaN, and
        # 0 * NaN is NaN.
        readable = key_positions.clamp(first, last)  # [num_seqs, KV_SPLIT]
        slots = tables.gather(1, readable // block_size) * block_size + readable % block_size
        keys = _gather(k_cache, slots, queries.shape[4], kv_scales and kv_scales[0])
        values = _gather(v_cache, slots, queries.shape[4], kv_scales and kv_scales[1])

        hidden = key_positions > positions
        if sliding_window is not None:
            hidden |= key_positions <= positions - sliding_window
        scores = _products(queries, keys.transpose(2, 3)).masked_fill_(hidden, float("-inf"))
        new_max = torch.maximum(running_max, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(new_max).exp_()
        shrink = running_max.sub_(new_max).exp_()
        running_sum.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        acc.mul_(shrink).add_(_products(weights, values))
        running_max = new_max
    return acc.div_(running_sum)[..., :num_rows, :head_dim].to(rows.dtype)


def _gather(cache: Tensor, slots: Tensor, padded_head_dim: int, scales: Tensor | None) -> Tensor:
    """Read slots [num_seqs, KV_SPLIT]: float32 [num_seqs, num_kv_heads, KV_SPLIT, head_dim]."""
    num_kv_heads, head_dim = cache.shape[2:]
    if scales is None:
        read = cache.flatten(0, 1).index_select(0, slots.flatten())
    else:
        read = read_codes(cache, scales, slots.flatten())
    by_head = read.view(*slots.shape, num_kv_heads, head_dim).transpose(1, 2)
    by_head = by_head.to(torch.float32, memory_format=torch.contiguous_format)
    if head_dim == padded_head_dim:
        return by_head
    return functional.pad(by_head, (0, padded_head_dim - head_dim))


def _products(tiles: Tensor, matrices: Tensor) -> Tensor:
    """[num_seqs, num_kv_heads, num_tiles, rows, x] times [num_seqs, num_kv_heads, x, y]."""
    num_tiles = tiles.shape[2]
    out = tiles.new_empty(*tiles.shape[:4], matrices.shape[3])
    tiles, matrices, outs = tiles.flatten(0, 1), matrices.flatten(0, 1), out.flatten(0, 1)
    if num_tiles == 1:
        torch.bmm(tiles.squeeze(1), matrices, out=outs.squeeze(1))
    else:  # head by head, as a batch of tiles shares its matrix only if that is expanded
        for head, matrix, product in zip(tiles, matrices, outs, strict=True):
            torch.bmm(head, matrix.expand(num_tiles, -1, -1), out=product)
    return out
