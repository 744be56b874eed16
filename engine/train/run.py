"""A training job in progress: its data, what is trained, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from engine.api import TrainingEvent, TrainingJob, TrainingNote
from engine.errors import EngineError
from engine.lora import LoraWeights
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batches import epoch_batches, sample_lengths
from engine.train.checkpoint import TrainerState
from engine.train.config import TrainConfig
from engine.train.objectives import Objective
from engine.train.optimizer import AdamW
from engine.train.token_dataset import TokenDataset

T = TypeVar("T")
Slices = Generator[TrainingEvent | None, None, T]
"""Work that yields None where others may run, and events as they happen."""

MASTER = "master."
"""Before a group's name, in a checkpoint's tensors; before the optimizer's names is OPTIMIZER."""
OPTIMIZER = "optimizer."


@dataclass(slots=True)
class Run:
    """A job that is ready to go on; `state` is replaced as it does."""

    job: TrainingJob
    model: CausalLM
    dataset: TokenDataset
    validation: TokenDataset | None
    adapter: TrainableAdapter
    optimizer: AdamW
    objective: Objective
    state: TrainerState
    best_before: tuple[int | None, float | None] = (None, None)
    """best_step and best_value before the last evaluation."""
    _epoch: tuple[int, list[list[int]]] = field(default=(-1, []), init=False)
    """(number, batches) of the epoch that runs."""

    @property
    def config(self) -> TrainConfig:
        """Resolved."""
        return self.state.config

    @property
    def num_steps(self) -> int:
        assert self.config.max_steps is not None
        return self.config.max_steps

    @property
    def steps_per_epoch(self) -> int:
        assert self.config.batch_size is not None
        return math.ceil(self.dataset.num_samples / self.config.batch_size)

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.num_steps

    @property
    def is_finished(self) -> bool:
        """Whether no step is to follow."""
        return self.is_last or self.state.has_waited_enough

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the state is to be evaluated and has not been."""
        step, every = self.state.step, self.config.eval_every_steps
        assert every is not None
        if self.validation is None or step == 0 or self.state.evaluated_step == step:
            return False
        return step % every == 0 or self.is_last

    @property
    def save_is_due(self) -> bool:
        """Whether there should be a checkpoint of this step."""
        step, every = self.state.step, self.config.save_every_steps
        assert every is not None
        return step > 0 and (step % every == 0 or self.state.best_step == step or self.is_finished)

    def batch(self) -> list[int]:
        """The samples that the next step learns from."""
        epoch, index = divmod(self.state.step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            assert self.config.batch_size is not None
            batches = epoch_batches(
                sample_lengths(self.dataset),
                batch_size=self.config.batch_size,
                seed=self.config.seed,
                epoch=epoch,
                group_by_length=self.config.group_by_length,
            )
            self._epoch = (epoch, batches)
        return self._epoch[1][index]

    def note(self, level: Literal["info", "warn", "error"], message: str) -> TrainingNote:
        """Something that the job's owner should know."""
        return TrainingNote(job_id=self.job.job_id, level=level, message=message)

    def weights(self) -> LoraWeights:
        """A copy of the adapter as it is now, in host memory."""
        return self.adapter.weights(self.state.base_fingerprint)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that changes, for a checkpoint."""
        masters = {f"{MASTER}{group.name}": group.master for group in self.adapter.groups}
        state = self.optimizer.state_dict()
        return masters | {f"{OPTIMIZER}{name}": tensor for name, tensor in state.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what tensors() gave.

        Raises:
            EngineError: they are another adapter's.
        """
        own = {f"{MASTER}{group.name}": group.master for group in self.adapter.groups}
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(MASTER)}
        if {name: t.shape for name, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise EngineError(
                "The checkpoint is of another adapter: rank or target modules differ. Resume with "
                "the settings that the job was started with."
            )
        for name, master in own.items():
            master.copy_(saved[name])
        self.optimizer.load_state_dict(
            {
                name.removeprefix(OPTIMIZER): tensor
                for name, tensor in tensors.items()
                if name.startswith(OPTIMIZER)
            }
        )
