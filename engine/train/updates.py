"""What an adapter adds to the projections of one pass through the layers, in the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.layers import FusedLinear
from engine.lora import LoraWeights
from engine.train.adapter import TrainableAdapter


@dataclass(frozen=True, slots=True, eq=False)
class SliceUpdate:
    """y[:, start:stop] += scaling * x a^T b^T, and where the gradients go."""

    start: int
    stop: int
    rows: slice
    """Those of its a in the projection's stack."""
    b: torch.Tensor
    """[stop - start, rank]."""
    a_grad: torch.Tensor | None
    """float32 [rank, in_features]; None where nothing is learnt."""
    b_grad: torch.Tensor | None
    """float32, b's shape."""


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionUpdate:
    """The updates of a projection's slices, which share their input."""

    a: torch.Tensor
    """[sum of ranks, in_features], all a one under another."""
    parts: tuple[SliceUpdate, ...]
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    a: torch.Tensor
    b: torch.Tensor
    a_grad: torch.Tensor | None
    b_grad: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Updates:
    """All updates of one pass: a training adapter's, a frozen one's, or none."""

    modules: Mapping[str, _Module]
    scaling: float
    dropout: float
    """0 where nothing is to be dropped."""
    seed: int
    """Of this pass's dropout."""
    grad_scale: float
    """Gradients are multiplied by it as they are added: one over the loss's denominator. The
    backward pass itself runs on sums, whose size half types can hold."""

    def of(self, projection: FusedLinear, dtype: torch.dtype) -> ProjectionUpdate | None:
        """What is added to a projection, the matrices in that dtype; None: nothing."""
        stack, parts, column, row = [], [], 0, 0
        for part in projection.slices:
            module = self.modules.get(part.path)
            if module is not None:
                rows = slice(row, row + len(module.a))
                parts.append(
                    SliceUpdate(
                        column, column + part.out_features, rows, module.b.to(dtype),
                        module.a_grad, module.b_grad,
                    )
                )  # fmt: skip
                stack.append(module.a)
                row = rows.stop
            column += part.out_features
        if not stack:
            return None
        a = torch.cat(stack) if len(stack) > 1 else stack[0]
        return ProjectionUpdate(a.to(dtype), tuple(parts), self.scaling)

    def touches(self, projections: tuple[FusedLinear, ...]) -> bool:
        """Whether one of these projections is adapted."""
        return any(part.path in self.modules for fused in projections for part in fused.slices)


def training_updates(adapter: TrainableAdapter, *, seed: int, denominator: float) -> Updates:
    """Updates that learn: dropout is on, gradients go to the adapter."""
    modules = {
        path: _Module(module.a, module.b, module.a_grad, module.b_grad)
        for path, module in adapter.modules.items()
    }
    dropout = adapter.config.dropout
    assert dropout is not None, "the run's config is not resolved"
    return Updates(modules, adapter.scaling, dropout, seed, 1 / denominator)


def fixed_updates(adapter: TrainableAdapter | LoraWeights | None) -> Updates:
    """Updates as they are served: no dropout, nothing learnt. None: the base alone."""
    scaling = adapter.scaling if isinstance(adapter, TrainableAdapter) else 1.0
    modules = {} if adapter is None else adapter.modules
    fixed = {path: _Module(module.a, module.b, None, None) for path, module in modules.items()}
    return Updates(fixed, scaling, 0.0, 0, 0.0)
