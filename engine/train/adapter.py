"""The adapter that is being trained: float32 masters and their gradients, flat per layer.

One group is one decoder layer's low-rank matrices, or the score head: a flat buffer of values and
one of gradients, so that clipping, the optimizer and its paging handle a layer as one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.errors import AdapterError
from engine.lora import SCORE_HEAD, LoraModule, LoraWeights
from engine.model_config import ModelSpec
from engine.train.config import TrainConfig
from engine.train.targets import target_paths

SCORE_STD = 0.02
"""Of a new score head's weights, as transformers initialises it."""


@dataclass(frozen=True, slots=True, eq=False)
class ParameterGroup:
    """Parameters that are handled as one tensor."""

    name: str
    """ "layers.3", or "score"."""
    master: torch.Tensor
    """float32 [numel], the values."""
    grad: torch.Tensor
    """float32 [numel], gradients added up since zero_grads()."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainableModule:
    """One linear layer's update, x a^T b^T times the scaling: views into its group's buffers."""

    a: torch.Tensor
    """float32 [rank, in_features]."""
    b: torch.Tensor
    """float32 [out_features, rank]; the scaling is not in it."""
    a_grad: torch.Tensor
    b_grad: torch.Tensor


class TrainableAdapter:
    """All that is trained of one job, and what it is scaled by."""

    def __init__(
        self,
        config: TrainConfig,
        groups: list[ParameterGroup],
        modules: dict[str, TrainableModule],
        score: torch.Tensor | None,
        score_grad: torch.Tensor | None,
    ) -> None:
        self.config = config
        self.groups = groups
        """By layer, those that have something to train; the score head, if any, is the last."""
        self.modules = modules
        """By module path."""
        self.score = score
        """float32 [1, hidden_size]: the score head of a reward model."""
        self.score_grad = score_grad
        root = math.sqrt(config.rank) if config.use_rslora else config.rank
        self.scaling = config.alpha / root

    @classmethod
    def create(
        cls, spec: ModelSpec, config: TrainConfig, device: torch.device | str
    ) -> TrainableAdapter:
        """A new adapter, which changes nothing yet: a is random, b is zero, as peft's.

        Args:
            spec:   the base.
            config: resolved: dropout is filled in.
            device: the base's.

        Raises:
            RequestError: target_modules name no layer that can be trained.
        """
        shapes = spec.linear_shapes()
        by_layer: dict[str, list[str]] = {}
        for path in target_paths(spec, config.target_modules):
            by_layer.setdefault(path.split(".")[2], []).append(path)
        groups, modules = [], {}
        for layer, paths in by_layer.items():
            sizes = [config.rank * sum(shapes[path]) for path in paths]
            group = _new_group(f"layers.{layer}", sum(sizes), device)
            values, grads = torch.split(group.master, sizes), torch.split(group.grad, sizes)
            for path, value, grad in zip(paths, values, grads, strict=True):
                a, b = _matrices(value, *shapes[path], config.rank)
                modules[path] = TrainableModule(a, b, *_matrices(grad, *shapes[path], config.rank))
            groups.append(group)
        score = score_grad = None
        if config.method == "reward":
            group = _new_group(SCORE_HEAD, spec.hidden_size, device)
            score, score_grad = group.master.view(1, -1), group.grad.view(1, -1)
            groups.append(group)
        adapter = cls(config, groups, modules, score, score_grad)
        adapter._initialise()
        return adapter

    @property
    def num_parameters(self) -> int:
        return sum(group.master.numel() for group in self.groups)

    def zero_grads(self) -> None:
        """Forget the gradients added up so far."""
        for group in self.groups:
            group.grad.zero_()

    def load_weights(self, weights: LoraWeights) -> None:
        """Begin with another adapter's weights. Layers that it does not change start afresh, and a
        smaller rank is filled up with new directions.

        Raises:
            AdapterError: something of it could not be trained further, or would be lost.
        """
        _check_loadable(weights, self)
        with torch.no_grad():
            for path, module in weights.modules.items():
                own, rank = self.modules[path], module.a.shape[0]
                own.a[:rank] = module.a
                own.b.zero_()
                own.b[:, :rank] = module.b.float() / self.scaling
            score = weights.replaced.get(f"{SCORE_HEAD}.weight")
            if score is not None and self.score is not None:
                self.score.copy_(score)

    def weights(self, base_fingerprint: str | None = None) -> LoraWeights:
        """A copy in host memory, as it would be served."""
        modules = {
            path: LoraModule(a=_copy(module.a), b=_copy(module.b).mul_(self.scaling))
            for path, module in self.modules.items()
        }
        replaced = {} if self.score is None else {f"{SCORE_HEAD}.weight": _copy(self.score)}
        return LoraWeights(modules=modules, replaced=replaced, base_fingerprint=base_fingerprint)

    def _initialise(self) -> None:
        """On the host, so that every device begins with the same values."""
        generator = torch.Generator().manual_seed(self.config.seed)
        for module in self.modules.values():
            a = torch.empty(module.a.shape)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            module.a.copy_(a)
        if self.score is not None:
            values = torch.empty(self.score.shape).normal_(0.0, SCORE_STD, generator=generator)
            self.score.copy_(values)


def _new_group(name: str, numel: int, device: torch.device | str) -> ParameterGroup:
    values = torch.zeros(numel, dtype=torch.float32, device=device)
    return ParameterGroup(name, values, torch.zeros_like(values))


def _matrices(
    flat: torch.Tensor, out_features: int, in_features: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (a [rank, in_features], b [out_features, rank]) of one module's part of a group."""
    a, b = torch.split(flat, [rank * in_features, out_features * rank])
    return a.view(rank, in_features), b.view(out_features, rank)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _check_loadable(weights: LoraWeights, adapter: TrainableAdapter) -> None:
    """Refuse, all at once, what training could not go on from."""
    problems = []
    rank = adapter.config.rank
    for path, module in weights.modules.items():
        own = adapter.modules.get(path)
        if own is None:
            problems.append(f"{path}: it is adapted there, but not among target_modules")
        elif module.magnitude is not None:
            problems.append(f"{path}: DoRA cannot be trained further")
        elif module.bias is not None:
            problems.append(f"{path}: a bias of lora_B cannot be trained further")
        elif module.a.shape[0] > rank:
            problems.append(f"{path}: rank {module.a.shape[0]}, more than the run's rank {rank}")
        elif module.a.shape[1:] != own.a.shape[1:] or module.b.shape[:1] != own.b.shape[:1]:
            problems.append(f"{path}: its shapes are another base's")
    for name in weights.replaced:
        if name != f"{SCORE_HEAD}.weight":
            problems.append(f"{name}: a replaced tensor of the base cannot be trained further")
        elif adapter.score is not None and weights.replaced[name].shape != adapter.score.shape:
            problems.append(f"{name}: expected shape {tuple(adapter.score.shape)}")
    if problems:
        raise AdapterError(
            "Training cannot start from this adapter: " + "; ".join(problems) + ". Choose another "
            "to start from, or change rank and target_modules."
        )
