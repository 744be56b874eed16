"""Causal attention over a paged KV cache; prompt chunks and single tokens in one flat batch.

Numerics: scores, softmax and sums in float32, rounded once to q's dtype.
A row's bits depend on its own query and keys alone: not on the rest of the batch, nor on the blocks that hold the keys,
nor on whether it is decoded or part of a prompt chunk. For that, every product has one shape, [tile rows, head_dim,
KV_SPLIT], and splits, counted from position 0 of the sequence, are joined one after another by a running softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch

KV_SPLIT = 256
"""Key positions in one product."""
TILE_ROWS = 4
"""A tile's rows are consecutive queries times the query heads that share a kv head, then zeros up to a multiple of this.
With other numbers of rows (and of columns, next line) MKL's sums depend on how many threads take part."""
HEAD_DIM_MULTIPLE = 16
CHUNK_QUERIES = 128
"""Queries of one prompt chunk handled at a time."""
MAX_ELEMENTS = 1 << 19
"""Elements of a temporary at most, where there is a choice: 2 MB of float32, so that it stays in cache."""
NOTHING_SEEN = -1e30
"""Running maximum of a row before its first key: finite, so that no infinities are subtracted from each other."""


def write_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store this step's keys and values in their slots, rounded to the cache's dtype.

    Args:
        k, v:             [num_tokens, num_kv_heads, head_dim].
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping:     int64 [num_tokens], block_id * block_size + offset; -1 = do not store.

    Raises:
        ValueError: shapes disagree.
    """
    check(k.shape == v.shape, "v.shape", tuple(k.shape), tuple(v.shape))
    check(k_cache.dim() == 4 and k.shape[1:] == k_cache.shape[2:], "k_cache.shape", ("num_blocks", "block_size", *k.shape[1:]), tuple(k_cache.shape))
    check(v_cache.shape == k_cache.shape, "v_cache.shape", tuple(k_cache.shape), tuple(v_cache.shape))
    check(slot_mapping.shape == (len(k),), "slot_mapping.shape", (len(k),), tuple(slot_mapping.shape))
    dispatch("write_kv_cache", write_kv_cache_reference, k, v, k_cache, v_cache, slot_mapping)


def write_kv_cache_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """write_kv_cache in plain PyTorch."""
    stored = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[stored]
    k_cache.flatten(0, 1)[slots] = k[stored].to(k_cache.dtype)
    v_cache.flatten(0, 1)[slots] = v[stored].to(v_cache.dtype)


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
) -> Tensor:
    """Attend each new token to the keys of its sequence up to its own position.

    Query i of a sequence with n new tokens and context length c sits at position c - n + i; it sees key j iff j is not
    after it and, with a sliding window, position - j < sliding_window.

    Args:
        q:                [num_tokens, num_heads, head_dim], sequences one after another.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        block_tables:     int32 [num_seqs, max_num_blocks], padded with -1.
        context_lens:     int32 [num_seqs], this step's tokens included.
        cu_seqlens_q:     int32 [num_seqs + 1], prefix sums of new tokens.
        scale:            multiplies the scores, usually head_dim ** -0.5.

    Returns:
        q's shape and dtype.

    Raises:
        ValueError: shapes disagree, or the window is not positive.
    """
    num_seqs = len(context_lens)
    check(q.dim() == 3 and q.shape[2] == k_cache.shape[-1], "q.shape", ("num_tokens", "num_heads", k_cache.shape[-1]), tuple(q.shape))
    check(k_cache.dim() == 4 and q.shape[1] % k_cache.shape[2] == 0, "k_cache.shape", f"num_kv_heads that divides {q.shape[1]}", tuple(k_cache.shape))
    check(v_cache.shape == k_cache.shape, "v_cache.shape", tuple(k_cache.shape), tuple(v_cache.shape))
    check(len(block_tables) == num_seqs, "block_tables.shape[0]", num_seqs, len(block_tables))
    check(len(cu_seqlens_q) == num_seqs + 1, "cu_seqlens_q.shape[0]", num_seqs + 1, len(cu_seqlens_q))
    check(sliding_window is None or sliding_window > 0, "sliding_window", "a positive number or None", sliding_window)
    return dispatch("paged_attention", paged_attention_reference, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, scale, sliding_window)


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor,
    scale: float, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """paged_attention in plain PyTorch: several decodes at a time, then prompt chunks one by one."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    group = q.shape[1] // num_kv_heads
    queries = q.unflatten(1, (num_kv_heads, group))  # [num_tokens, num_kv_heads, group, head_dim]
    out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
    bounds, lens = cu_seqlens_q.tolist(), context_lens.tolist()
    num_new = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]

    def first_visible(position: int) -> int:
        return 0 if sliding_window is None else max(0, position - sliding_window + 1)

    decodes = sorted((seq for seq, n in enumerate(num_new) if n == 1), key=lambda seq: lens[seq])
    seqs_at_once = max(1, MAX_ELEMENTS // (num_kv_heads * KV_SPLIT * head_dim))
    for i in range(0, len(decodes), seqs_at_once):
        seqs = decodes[i : i + seqs_at_once]
        tokens, last = [bounds[seq] for seq in seqs], [lens[seq] - 1 for seq in seqs]
        visible = torch.tensor([[first_visible(position) for position in last], last], device=q.device)
        rows = queries[tokens][:, :, None]  # [num_seqs, num_kv_heads, 1 tile, group, head_dim]
        positions = visible[1].view(-1, 1, 1, 1, 1)
        attended = _attend(rows, positions, visible, k_cache, v_cache, block_tables[seqs], scale, sliding_window)
        out[tokens] = attended[:, :, 0]

    tile = max(1, TILE_ROWS // group)  # queries in a tile
    heads_at_once = max(1, MAX_ELEMENTS // (CHUNK_QUERIES * group * KV_SPLIT))
    for seq in (seq for seq, n in enumerate(num_new) if n > 1):
        for start in range(bounds[seq], bounds[seq + 1], CHUNK_QUERIES):
            stop = min(start + CHUNK_QUERIES, bounds[seq + 1])
            num_tiles = -(-(stop - start) // tile)
            first = lens[seq] - bounds[seq + 1] + start  # position of query `start`
            last = first + stop - start - 1
            visible = torch.tensor([[first_visible(first)], [last]], device=q.device)
            positions = torch.arange(first, first + num_tiles * tile, device=q.device).repeat_interleave(group)
            positions = positions.view(1, 1, num_tiles, tile * group, 1)
            padded = torch.nn.functional.pad(queries[start:stop], (0, 0) * 3 + (0, num_tiles * tile - (stop - start)))
            tiles = padded.unflatten(0, (num_tiles, tile)).permute(2, 0, 1, 3, 4).flatten(2, 3)[None]
            for head in range(0, num_kv_heads, heads_at_once):
                heads = slice(head, head + heads_at_once)
                attended = _attend(
                    tiles[:, heads], positions, visible, k_cache[:, :, heads], v_cache[:, :, heads],
                    block_tables[seq : seq + 1], scale, sliding_window,
                )  # fmt: skip
                by_query = attended[0].unflatten(2, (tile, group)).flatten(1, 2)  # [heads, queries, group, head_dim]
                out[start:stop, heads] = by_query[:, : stop - start].transpose(0, 1)
    return out.flatten(1, 2)


def _attend(
    rows: Tensor, positions: Tensor, visible: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor,
    scale: float, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Attend tiles of rows, all tiles of a sequence to the same gathered keys.

    Args:
        rows:      [num_seqs, num_heads, num_tiles, rows, head_dim], one head per kv head.
        positions: int64, broadcastable to rows' shape: each row's position.
        visible:   int64 [2, num_seqs]: first and last position that any row of the sequence may see.

    Returns:
        rows' shape and dtype.
    """
    num_seqs, num_heads, num_tiles, num_rows, head_dim = rows.shape
    padding = (0, -head_dim % HEAD_DIM_MULTIPLE, 0, -num_rows % TILE_ROWS)
    queries = torch.nn.functional.pad(rows.float() * scale, padding)
    if positions.shape[3] > 1:
        positions = torch.nn.functional.pad(positions, (0, 0, 0, padding[3]))
    acc = torch.zeros_like(queries)
    running_max = acc.new_full((*acc.shape[:4], 1), NOTHING_SEEN)
    running_sum = torch.zeros_like(running_max)
    first, last = visible[0][:, None], visible[1][:, None]
    block_size = k_cache.shape[1]
    start, stop = int(first.min()), int(last.max()) + 1
    for split in range(start - start % KV_SPLIT, stop, KV_SPLIT):
        key_positions = torch.arange(split, split + KV_SPLIT, device=rows.device)
        # Positions that no row may see read a visible one: another slot may hold anything, and 0 * NaN is NaN.
        readable = key_positions.clamp(first, last)  # [num_seqs, KV_SPLIT]
        slots = tables.gather(1, readable // block_size) * block_size + readable % block_size
        keys = _gather(k_cache, slots, queries.shape[4])
        values = _gather(v_cache, slots, queries.shape[4])

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


def _gather(cache: Tensor, slots: Tensor, padded_head_dim: int) -> Tensor:
    """Read slots [num_seqs, KV_SPLIT] of a cache: float32 [num_seqs, num_heads, KV_SPLIT, padded_head_dim]."""
    num_heads, head_dim = cache.shape[2:]
    read = cache.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, num_heads, head_dim)
    out = torch.empty((len(slots), num_heads, KV_SPLIT, padded_head_dim), device=cache.device)
    out[..., :head_dim] = read.transpose(1, 2)
    out[..., head_dim:] = 0.0
    return out


def _products(tiles: Tensor, matrices: Tensor) -> Tensor:
    """Multiply [num_seqs, num_heads, num_tiles, rows, x] with [num_seqs, num_heads, x, y], the same for all tiles."""
    num_seqs, num_heads, num_tiles, num_rows, _ = tiles.shape
    out = tiles.new_empty(*tiles.shape[:4], matrices.shape[3])
    if num_tiles == 1:
        torch.bmm(tiles.flatten(0, 2), matrices.flatten(0, 1), out=out.view(-1, num_rows, out.shape[4]))
        return out
    for rows, matrix, product in zip(tiles.flatten(0, 1), matrices.flatten(0, 1), out.flatten(0, 1), strict=True):
        torch.bmm(rows, matrix.expand(num_tiles, -1, -1), out=product)
    return out
