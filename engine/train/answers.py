"""grpo: what the trainer asks of whoever draws answers; engine/train/rollouts.py does."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from engine.api import AdapterRef
from engine.lora import LoraWeights
from engine.train.batches import Sample
from engine.train.config import TrainConfig
from engine.train.run import Run


class Answers(Protocol):
    """Answers to a batch of prompts, scored."""

    @property
    def samples(self) -> list[Sample]:
        """num_generations per prompt, with advantages."""
        ...

    @property
    def metrics(self) -> dict[str, tuple[float, float]]:
        """(sum, count) by name; "reward" is among them."""
        ...


class Rollouts(Protocol):
    """Draws answers from a policy and has them scored."""

    @property
    def is_waiting(self) -> bool:
        """Whether the generator of draw() could get no further before the engine has stepped."""
        ...

    def draw(
        self,
        policy: LoraWeights,
        prompts: Sequence[Sequence[int]],
        *,
        config: TrainConfig,
        reward_adapter: AdapterRef,
        step: int,
        is_evaluation: bool = False,
    ) -> Generator[None, None, Answers]:
        """Have each prompt answered; yields while it waits. The same arguments give the same."""
        ...


class DrawAnswers(Protocol):
    """Has prompts answered by a run's policy as it is now."""

    def __call__(
        self, run: Run, prompts: list[list[int]], *, is_evaluation: bool
    ) -> Generator[None, None, Answers]: ...
