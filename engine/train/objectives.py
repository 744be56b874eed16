"""What is minimised: one small object says it, the same loop runs it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.lora import LoraWeights
from engine.train.batch import TokenBatch
from engine.train.config import Method, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A method and its settings."""

    method: Method
    beta: float = 0.1
    """dpo: how closely the policy is held to the reference."""
    kl_coefficient: float = 0.0
    """grpo: weight of the divergence from the reference."""
    clip_epsilon: float = 0.2
    """grpo: how far a token's probability may move from the one it was drawn with."""
    reference: LoraWeights | None = None
    """dpo, and grpo with a kl_coefficient: the frozen adapter to compare with; None: the base."""


def make_objective(config: TrainConfig, reference: LoraWeights | None = None) -> Objective:
    """The objective of a run."""
    return Objective(
        method=config.method, beta=config.beta, kl_coefficient=config.kl_coefficient,
        clip_epsilon=config.clip_epsilon, reference=reference,
    )  # fmt: skip


def denominator_of(objective: Objective, batch: TokenBatch) -> float:
    """What a micro-batch adds to its effective batch's denominator: pairs, or loss weights."""
    if objective.method in ("reward", "dpo"):
        return batch.num_sequences / 2
    return float(batch.loss_weights.sum())
