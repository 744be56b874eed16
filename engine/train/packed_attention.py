"""Causal attention over sequences that lie one after another and never see each other.

Sequences of like length form a rectangle, the shorter ones filled up at their end: what follows a
token is never seen by it, so nothing needs a mask but a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.train.short_attention import MAX_LENGTH, short_attention

FILL = 0.75
"""A sequence joins a rectangle when it fills at least this share of a row."""


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Some sequences, as rows of one length."""

    num_rows: int
    length: int
    tokens: Tensor | slice
    """Where the rows' tokens are in the batch: int64 [num_rows * length], any token where a row is
    filled up, or a slice where nothing is."""
    own: Tensor | None
    """int64: which of these places are tokens; None: all."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """The rectangles of a micro-batch, made once for all layers."""

    rectangles: tuple[Rectangle, ...]
    order: Tensor | None
    """int64 [num_tokens]: where each token's result is in the rectangles' results, one after
    another; None: in that order already."""


def pack(lengths: Sequence[int], device: torch.device) -> PackedLayout:
    """Lay out sequences of these lengths."""
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    if len(set(lengths)) == 1:
        whole = Rectangle(len(lengths), lengths[0], slice(0, starts[-1]), None)
        return PackedLayout((whole,), None)
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in longest_first:
        if not groups or lengths[index] < FILL * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    rectangles, found = [], []
    for group in groups:
        length = lengths[group[0]]
        column = torch.arange(length)
        own = torch.stack([column < lengths[index] for index in group])
        tokens = torch.stack([starts[index] + column for index in group])
        tokens = torch.where(own, tokens, starts[group[0]])
        found.append(tokens[own])
        rectangles.append(
            Rectangle(
                len(group), length, tokens.view(-1).to(device),
                None if bool(own.all()) else own.view(-1).nonzero().view(-1).to(device),
            )
        )  # fmt: skip
    order = torch.cat(found).argsort()
    return PackedLayout(tuple(rectangles), order.to(device))


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, sliding_window: int | None
) -> Tensor:
    """Attend within each sequence.

    Args:
        q:              [num_tokens, num_heads, head_dim].
        k, v:           [num_tokens, num_kv_heads, head_dim].
        layout:         of the batch.
        sliding_window: query i sees key j when 0 <= i - j < window; None: all before.

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    results = []
    for part in layout.rectangles:
        shape = (part.num_rows, part.length, *q.shape[1:])
        queries, keys, values = (
            tensor[part.tokens].view(shape).transpose(1, 2) for tensor in (q, k, v)
        )
        attended = _attend(queries, keys, values, sliding_window)
        result = attended.transpose(1, 2).reshape(-1, *q.shape[1:])
        results.append(result if part.own is None else result[part.own])
    joined = torch.cat(results) if len(results) > 1 else results[0]
    return joined if layout.order is None else joined[layout.order]


def _attend(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> Tensor:
    """Causal attention of full rows, [num_rows, num_heads, length, head_dim] each."""
    length = q.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if q.device.type == "cpu" and length <= MAX_LENGTH:
        mask = torch.zeros(length, length).masked_fill_(~_visible(length, window, q.device), -1e30)
        return short_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask).view_as(q)
    if window is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    visible = _visible(length, window, q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length]: what each query sees."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril() if window is None else everything.tril().triu(1 - window)
