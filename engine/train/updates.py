"""What an adapter adds to the projections of one pass through the layers, in the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.layers import FusedLinear
from engine.lora import LoraWeights
from engine.train.adapter import TrainableAdapter


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """y[:, start:stop] += scaling * x a^T b^T, and where its gradients go."""

    start: int
    stop: int
    a: torch.Tensor
    """[rank, in_features]."""
    b: torch.Tensor
    """[stop - start, rank]."""
    scaling: float
    a_grad: torch.Tensor | None
    """float32, a's shape; None where nothing is learnt."""
    b_grad: torch.Tensor | None


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

    def of(self, projection: FusedLinear, dtype: torch.dtype) -> tuple[Update, ...]:
        """The updates of a projection's slices, their matrices in that dtype."""
        found, start = [], 0
        for part in projection.slices:
            stop = start + part.out_features
            module = self.modules.get(part.path)
            if module is not None:
                a, b = module.a.to(dtype), module.b.to(dtype)
                found.append(Update(start, stop, a, b, self.scaling, module.a_grad, module.b_grad))
            start = stop
        return tuple(found)

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
