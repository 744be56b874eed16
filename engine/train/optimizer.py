"""AdamW over flat groups of parameters, with 32-bit or block-wise 8-bit state, paged or not.

Memory   an update needs a few buffers of CHUNK elements, allocated before anything changes: where
         there is no room nothing has been touched, and the chunk is tried once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.train.adamw import (
    BLOCK,
    AdamWSettings,
    update_8bit,
    update_32bit,
    zeros_8bit,
    zeros_32bit,
)
from engine.train.config import TrainConfig
from engine.train.state_pager import StatePager

MIN_8BIT_ELEMENTS = 4096
"""Smaller groups keep 32-bit state: they cost nothing and are the most sensitive."""
CHUNK = 4096 * BLOCK
"""Elements updated at once."""
CLIP_EPSILON = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


class ParameterGroup(Protocol):
    """Parameters that are updated together; engine/train/adapter.py's."""

    @property
    def name(self) -> str: ...

    @property
    def master(self) -> Tensor:
        """float32 [n]."""
        ...

    @property
    def grad(self) -> Tensor:
        """float32 [n], on the same device."""
        ...


class AdamW:
    """The optimizer's state for all groups, and the update."""

    def __init__(self, groups: Sequence[ParameterGroup], config: TrainConfig) -> None:
        """
        Args:
            groups: what is optimised; master and grad may not be replaced afterwards.
            config: optimizer, paged, beta1, beta2, adam_epsilon and weight_decay are used here.
        """
        self._groups = groups
        self._settings = AdamWSettings(
            config.beta1, config.beta2, config.adam_epsilon, config.weight_decay
        )
        self.num_updates = 0
        """Updates made; a skipped step is none."""
        device = groups[0].master.device
        is_paged = bool(config.paged) and device.type == "cuda"  # the CPU's memory is the host's
        self._pager = StatePager(device) if is_paged else None
        home = torch.device("cpu") if is_paged else device
        self._states: list[dict[str, Tensor]] = []
        for group in groups:
            numel = group.master.numel()
            is_8bit = config.optimizer == "adamw_8bit" and numel >= MIN_8BIT_ELEMENTS
            make = zeros_8bit if is_8bit else zeros_32bit
            self._states.append(make(numel, home, pin_memory=is_paged))

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients; not finite where one of them is not."""
        norms = torch.stack([torch.linalg.vector_norm(group.grad) for group in self._groups])
        return float(torch.linalg.vector_norm(norms))

    def update(self, learning_rate: float, grad_scale: float = 1.0) -> Iterator[None]:
        """Make one update of all groups; yields after each of them.

        The iterator has to be used up: groups that it does not reach are not updated.

        Args:
            learning_rate: of this step.
            grad_scale:    multiplies the gradients, which are changed.

        Raises:
            torch.OutOfMemoryError: there was no room even at the second attempt.
        """
        self.num_updates += 1
        arrival = self._pager.fetch(self._states[0]) if self._pager else None
        for index, group in enumerate(self._groups):
            if self._pager is None or arrival is None:
                self._update_group(group, self._states[index], learning_rate, grad_scale)
            else:
                state = self._pager.wait(arrival)
                if index + 1 < len(self._groups):
                    arrival = self._pager.fetch(self._states[index + 1])
                self._update_group(group, state, learning_rate, grad_scale)
                self._pager.write_back(state, self._states[index])
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """All state by "<group>.<what>": on the CPU where paged, else where the groups are."""
        if self._pager is not None:
            self._pager.synchronize()
        tensors = {"num_updates": torch.tensor(self.num_updates)}
        for group, state in zip(self._groups, self._states, strict=True):
            tensors |= {f"{group.name}.{name}": tensor for name, tensor in state.items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what state_dict gave.

        Raises:
            EngineError: the tensors are not those of this optimizer and these groups.
        """
        own = self.state_dict()
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if found != {name: (tensor.dtype, tensor.shape) for name, tensor in own.items()}:
            raise EngineError(
                "The optimizer's state is of another adapter or another optimizer. Resume with "
                "the settings that the job was started with."
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.num_updates = int(tensors["num_updates"])

    def _update_group(
        self, group: ParameterGroup, state: dict[str, Tensor], learning_rate: float, scale: float
    ) -> None:
        update = update_8bit if "exp_avg_absmax" in state else update_32bit

        def update_chunk(start: int, stop: int) -> None:
            update(
                group.master[start:stop],
                group.grad[start:stop],
                {name: _slice(name, tensor, start, stop) for name, tensor in state.items()},
                learning_rate=learning_rate,
                grad_scale=scale,
                num_updates=self.num_updates,
                settings=self._settings,
            )

        for start in range(0, group.master.numel(), CHUNK):
            stop = min(start + CHUNK, group.master.numel())
            try:
                update_chunk(start, stop)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                update_chunk(start, stop)


def clip_scale(grad_norm: float, max_grad_norm: float) -> float:
    """What gradients of this norm are multiplied with; a max_grad_norm of 0 leaves them alone."""
    if max_grad_norm == 0:
        return 1.0
    return min(1.0, max_grad_norm / (grad_norm + CLIP_EPSILON))


def _slice(name: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """The part of a state tensor that belongs to elements start:stop; start is a whole block."""
    if name.endswith("_absmax"):
        return tensor[start // BLOCK : -(-stop // BLOCK)]
    return tensor[start:stop]
