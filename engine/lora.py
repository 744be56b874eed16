"""LoRA weights as the engine holds them, and what the adapters of a batch do to its layers.

An adapter changes a layer's output y in at most three ways, per token and scaled by the request's
lora_scale s:
    low rank      y += s * x a^T b^T                       every LoRA; one call for the whole pool
    element-wise  y += s * (gain * y + offset)             DoRA, trained biases, lora_bias
    dense         y  = (1 - s) * y + s * (x W^T + offset)  modules_to_save
so that s = 0 is the base and s = 1 the adapter as trained, whatever its kind. Layers that no
adapter of the batch touches cost nothing. Nothing here mixes tokens: a token's result does not
depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from engine.transfers import to_device
from kernels.linear import linear
from kernels.lora import LoraSlice, add_lora

EMBEDDING = "model.embed_tokens"
SCORE_HEAD = "score"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """The low-rank update of one linear layer: x @ a.T @ b.T, alpha / r folded into b."""

    a: torch.Tensor
    """[rank, in_features]; for an embedding [rank, vocab_size]."""
    b: torch.Tensor
    """[out_features, rank]; for an embedding [hidden_size, rank]."""
    magnitude: torch.Tensor | None = None
    """DoRA (arXiv:2402.09353): [out_features], the trained norm of each output row."""
    bias: torch.Tensor | None = None
    """lora_B.bias [out_features], already scaled; added to the delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One adapter on the CPU, read and checked; adapters/format.py produces it."""

    modules: dict[str, LoraModule]
    """By module path in the base: "model.layers.0.self_attn.q_proj", "model.embed_tokens"."""
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    """Full tensors instead of the base's, by parameter path: "lm_head.weight", "score.weight",
    "model.embed_tokens.weight" (modules_to_save), "....q_proj.bias" (bias="lora_only")."""
    base_copies: dict[str, torch.Tensor] = field(default_factory=dict)
    """Matrices of the base, by parameter path, that peft stores beside the LoRA of an embedding or
    a head. They count as replaced only where they differ from the base's."""
    base_fingerprint: str | None = None
    """Fingerprint of the base it was trained on, where the file names one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModule:
    """What one adapter does to one layer, on the device; engine/lora_placement.py works it out."""

    a: torch.Tensor | None = None
    """[rank, in_features] in the pool's dtype; the embedding's is [vocab_size, rank]."""
    b: torch.Tensor | None = None
    """[out_features, rank] in the pool's dtype, scaled by alpha / r and DoRA's magnitude / norm."""
    gain: torch.Tensor | None = None
    """float32 [out_features]; DoRA's magnitude / norm - 1."""
    offset: torch.Tensor | None = None
    """float32 [out_features]; what biases add."""
    dense: torch.Tensor | None = None
    """[out_features, in_features] instead of the base's weight, in the pool's dtype."""


PlacedAdapter = Mapping[str, PlacedModule]


def is_low_rank(adapter: PlacedAdapter) -> bool:
    """Whether an adapter is products of two matrices alone, but for a score head."""
    return all(
        path != EMBEDDING and module.gain is None and module.offset is None and module.dense is None
        for path, module in adapter.items()
        if path != SCORE_HEAD
    )


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What the pool's adapters do to one fused projection; made anew when the pool changes."""

    slices: tuple[LoraSlice, ...]
    low_rank_rows: frozenset[int]
    others: tuple[tuple[int, int, int, PlacedModule], ...]
    """(row, start, stop, module): the element-wise and dense parts, columns start:stop."""


def plan_layer(
    rows: Sequence[PlacedAdapter | None], paths: Sequence[str], widths: Sequence[int]
) -> LayerPlan:
    """Collect what each pool row does to the slices of one fused projection.

    Args:
        rows:   the adapter in each pool row, None where the row is free.
        paths:  module paths of the slices, in order.
        widths: out_features of each slice.
    """
    slices, others = [], []
    low_rank_rows: set[int] = set()
    start = 0
    for path, width in zip(paths, widths, strict=True):
        modules = [adapter.get(path) if adapter is not None else None for adapter in rows]
        pairs = [
            (m.a, m.b) if m is not None and m.a is not None and m.b is not None else None
            for m in modules
        ]
        if any(pair is not None for pair in pairs):
            slices.append(LoraSlice(start, start + width, pairs))
            low_rank_rows.update(row for row, pair in enumerate(pairs) if pair is not None)
        for row, module in enumerate(modules):
            if module is not None and not (
                module.gain is None and module.offset is None and module.dense is None
            ):
                others.append((row, start, start + width, module))
        start += width
    return LayerPlan(tuple(slices), frozenset(low_rank_rows), tuple(others))


class LoraBatch:
    """The adapters of one step's tokens; valid until the pool's rows change."""

    def __init__(
        self,
        adapters: Sequence[PlacedAdapter | None],
        plans: dict[tuple[str, ...], LayerPlan],
        widths: Mapping[str, int],
        rows: Sequence[int],
        lora_indices: torch.Tensor,
        lora_scales: torch.Tensor,
    ) -> None:
        """
        Args:
            adapters:     the adapter in each pool row.
            plans:        cache of layer plans, shared by all batches until the pool changes.
            widths:       out_features of every module path that an adapter may target.
            rows:         pool row of each token, -1 for the base.
            lora_indices: int32 [num_tokens], the same on the device.
            lora_scales:  float32 [num_tokens].
        """
        self._adapters = adapters
        self._plans = plans
        self._widths = widths
        self._rows = rows
        self._rows_in_use = {row for row in rows if row >= 0}
        self._tokens: dict[int, torch.Tensor] = {}
        self.lora_indices = lora_indices
        self.lora_scales = lora_scales

    def linear(self, paths: Sequence[str], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the adapters' part to a projection's output.

        Args:
            paths: module paths of the fused slices, in the order of y's columns.
            x:     [num_tokens, in_features], the projection's input.
            y:     [num_tokens, sum of out_features], the base's output; changed in place.

        Returns:
            y.
        """
        plan = self._plan(tuple(paths))
        for row, start, stop, module in plan.others:
            if row in self._rows_in_use:
                self._apply_other(row, module, x, y[:, start:stop])
        if not plan.low_rank_rows.isdisjoint(self._rows_in_use):
            add_lora(y, x, plan.slices, self.lora_indices, self.lora_scales)
        return y

    def embedding(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Add the adapters' part to the embedded tokens.

        Args:
            input_ids: int64 [num_tokens].
            hidden:    [num_tokens, hidden_size], the base's embeddings; changed in place.

        Returns:
            hidden.
        """
        for row in sorted(self._rows_in_use):
            adapter = self._adapters[row]
            module = adapter.get(EMBEDDING) if adapter is not None else None
            if module is None:
                continue
            tokens = self._tokens_of(row)
            ids, base = input_ids[tokens], hidden[tokens].float()
            change = torch.zeros_like(base)
            if module.dense is not None:
                base = base * (1 - self.lora_scales[tokens, None])
                change = module.dense[ids].float()
            elif module.gain is not None:
                change = module.gain * base
            if module.a is not None and module.b is not None:
                change = change + linear(module.a[ids], module.b).float()
            result = base + self.lora_scales[tokens, None] * change
            hidden[tokens] = result.to(hidden.dtype)
        return hidden

    def plans(self, projections: Sequence[tuple[str, ...]]) -> list[LayerPlan]:
        """What the pool's adapters do to each of these fused projections."""
        return [self._plan(paths) for paths in projections]

    def touches(self, rows: frozenset[int]) -> bool:
        """Whether a token of this batch has one of these pool rows."""
        return not rows.isdisjoint(self._rows_in_use)

    def select(self, positions: Sequence[int]) -> LoraBatch | None:
        """The same for some of the tokens, in the order given; None when all are the base's."""
        rows = [self._rows[position] for position in positions]
        if all(row < 0 for row in rows):
            return None
        index = to_device(torch.tensor(positions, dtype=torch.int64), self.lora_indices.device)
        return LoraBatch(
            self._adapters,
            self._plans,
            self._widths,
            rows,
            self.lora_indices[index],
            self.lora_scales[index],
        )

    def _plan(self, paths: tuple[str, ...]) -> LayerPlan:
        plan = self._plans.get(paths)
        if plan is None:
            plan = plan_layer(self._adapters, paths, [self._widths[path] for path in paths])
            self._plans[paths] = plan
        return plan

    def _tokens_of(self, row: int) -> torch.Tensor:
        """int64 [n]: the tokens of one pool row."""
        tokens = self._tokens.get(row)
        if tokens is None:
            positions = [
                position for position, token_row in enumerate(self._rows) if token_row == row
            ]
            index = torch.tensor(positions, dtype=torch.int64)
            tokens = to_device(index, self.lora_indices.device)
            self._tokens[row] = tokens
        return tokens

    def _apply_other(
        self, row: int, module: PlacedModule, x: torch.Tensor, y: torch.Tensor
    ) -> None:
        tokens = self._tokens_of(row)
        scales = self.lora_scales[tokens, None]  # [n, 1]
        base = y[tokens].float()
        if module.dense is not None:
            adapted = linear(x[tokens].to(module.dense.dtype), module.dense).float()
            if module.offset is not None:
                adapted = adapted + module.offset
            result = base * (1 - scales) + adapted * scales
        else:
            change = torch.zeros_like(base) if module.gain is None else module.gain * base
            if module.offset is not None:
                change = change + module.offset
            result = base + scales * change
        y[tokens] = result.to(y.dtype)
