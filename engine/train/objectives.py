"""What is minimised: one small object says it, the same loop runs it.

Losses are sums over a micro-batch, to be divided by the effective batch's denominator, so that a
batch may be cut anywhere. Names and normalisations are trl's:
    supervised  negative log-likelihood, weighted, per loss weight
    reward      -log sigmoid(better score - worse score) per pair (Bradley-Terry), scores at the
                sequences' last tokens
    dpo         -log sigmoid(beta * (better log-ratio - worse log-ratio)) per pair (sigmoid)
    grpo        the clipped policy gradient per token of all answers (dapo's normalisation), with
                the k3 estimate of the divergence from the reference
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import AdapterError
from engine.lora import LoraWeights
from engine.train.batch import TokenBatch
from engine.train.config import Method, TrainConfig

Metrics = dict[str, tuple[Tensor, int]]
"""(sum, count) by name; the sums are scalars on the device."""


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
    temperature: float = 1.0
    """grpo: of the answers drawn; logits are divided by it."""
    reference: LoraWeights | None = None
    """dpo, and grpo with a kl_coefficient: the frozen adapter to compare with, on the model's
    device; None: the base."""

    @property
    def is_preference(self) -> bool:
        """Whether sequences come in pairs."""
        return self.method in ("reward", "dpo")

    @property
    def needs_reference(self) -> bool:
        return self.method == "dpo" or (self.method == "grpo" and self.kl_coefficient > 0)


def make_objective(
    config: TrainConfig,
    reference: LoraWeights | None = None,
    device: torch.device | str = "cpu",
) -> Objective:
    """The objective of a run.

    Args:
        config:    the run's.
        reference: the frozen adapter of dpo and grpo; None: the base.
        device:    the model's.

    Raises:
        AdapterError: the reference is more than low-rank updates.
    """
    if reference is not None:
        modules = reference.modules.values()
        if any(m.magnitude is not None or m.bias is not None for m in modules) or (
            reference.replaced
        ):
            raise AdapterError(
                "A reference adapter may hold low-rank updates only, no DoRA, biases or replaced "
                "tensors. Choose another, or leave it out: the base is the reference then."
            )
        moved = {
            path: replace(module, a=module.a.to(device), b=module.b.to(device))
            for path, module in reference.modules.items()
        }
        reference = replace(reference, modules=moved)
    return Objective(
        method=config.method, beta=config.beta, kl_coefficient=config.kl_coefficient,
        clip_epsilon=config.clip_epsilon, reference=reference,
        temperature=config.temperature if config.method == "grpo" else 1.0,
    )  # fmt: skip


def denominator_of(objective: Objective, batch: TokenBatch) -> float:
    """What a micro-batch adds to its effective batch's denominator: pairs, or loss weights."""
    if objective.is_preference:
        return batch.num_sequences / 2
    return float(batch.loss_weights.sum())


def known_coefficients(objective: Objective, batch: TokenBatch) -> Tensor | None:
    """The loss's slope at each label's log-probability, where it is known without these.

    Returns:
        float32 [num_labels], or None where it depends on the log-probabilities.
    """
    weights = batch.loss_weights[batch.label_indices]
    if objective.method == "supervised":
        return -weights
    if objective.method == "grpo" and batch.old_logps is None and not objective.needs_reference:
        assert batch.advantages is not None, "answers without advantages"
        return -weights * batch.advantages[batch.label_sequences]
    return None


def token_loss(
    objective: Objective,
    batch: TokenBatch,
    logps: Tensor,
    reference_logps: Tensor | None,
    is_correct: Tensor,
) -> tuple[Tensor, Metrics]:
    """The loss as a function of log-probabilities: supervised, dpo and grpo.

    Args:
        logps:           float32 [num_labels], of the tokens at batch.label_indices.
        reference_logps: float32 [num_labels], where the objective needs them.
        is_correct:      bool [num_labels]: whether the token was the most probable one.

    Returns:
        (the sum, a scalar that autograd sees through; metrics).
    """
    weights = batch.loss_weights[batch.label_indices]
    if objective.method == "supervised":
        accuracy = (is_correct.sum().float(), logps.numel())
        return -(weights * logps).sum(), {"mean_token_accuracy": accuracy}
    if objective.method == "dpo":
        assert reference_logps is not None, "no reference"
        return _dpo(objective, batch, weights * logps, weights * reference_logps)
    return _grpo(objective, batch, weights, logps, reference_logps)


def _dpo(
    objective: Objective, batch: TokenBatch, logps: Tensor, reference_logps: Tensor
) -> tuple[Tensor, Metrics]:
    sums = logps.new_zeros(batch.num_sequences).index_add(0, batch.label_sequences, logps)
    reference_sums = torch.zeros_like(sums)
    reference_sums.index_add_(0, batch.label_sequences, reference_logps)
    rewards = objective.beta * (sums - reference_sums)  # [num_sequences]
    better, worse = rewards[0::2], rewards[1::2]
    loss = -functional.logsigmoid(better - worse).sum()
    with torch.no_grad():
        by_name = {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/accuracies": (better > worse).float(),
            "rewards/margins": better - worse,
            "logps/chosen": sums[0::2],
            "logps/rejected": sums[1::2],
        }
        return loss, {name: (values.sum(), len(values)) for name, values in by_name.items()}


def _grpo(
    objective: Objective,
    batch: TokenBatch,
    weights: Tensor,
    logps: Tensor,
    reference_logps: Tensor | None,
) -> tuple[Tensor, Metrics]:
    assert batch.advantages is not None, "answers without advantages"
    advantages = batch.advantages[batch.label_sequences]
    old = logps.detach() if batch.old_logps is None else batch.old_logps[batch.label_indices]
    ratio = torch.exp(logps - old)
    epsilon = objective.clip_epsilon
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    num_labels = logps.numel()
    with torch.no_grad():
        is_clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | (
            (ratio > 1 + epsilon) & (advantages > 0)
        )
        metrics: Metrics = {"clip_ratio": (is_clipped.float().sum(), num_labels)}
    if objective.needs_reference:
        assert reference_logps is not None, "no reference"
        difference = reference_logps - logps
        divergence = torch.exp(difference) - difference - 1
        losses = losses + objective.kl_coefficient * divergence
        metrics["kl"] = (divergence.detach().sum(), num_labels)
    return (weights * losses).sum(), metrics


def reward_loss(scores: Tensor) -> tuple[Tensor, Metrics]:
    """The loss of a reward model's scores, float32 [num_sequences]; pairs as in TokenBatch."""
    better, worse = scores[0::2], scores[1::2]
    loss = -functional.logsigmoid(better - worse).sum()
    with torch.no_grad():
        num_pairs = len(better)
        return loss, {
            "accuracy": ((better > worse).float().sum(), num_pairs),
            "margin": ((better - worse).sum(), num_pairs),
            "mean_reward": (scores.sum(), len(scores)),
        }
