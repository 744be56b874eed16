"""One micro-batch through the layers and back, in slices, so that others may run in between."""

from __future__ import annotations

from collections.abc import Generator

import torch

from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batch import StepResult, TokenBatch
from engine.train.objectives import Objective


def forward_backward(
    model: CausalLM,
    adapter: TrainableAdapter,
    batch: TokenBatch,
    objective: Objective,
    *,
    denominator: float,
    seed: int,
) -> Generator[None, None, StepResult]:
    """Add a micro-batch's gradients to the adapter's.

    Yields None between slices: each is half a layer forward, half a layer backward, or some rows of
    the head. On a GPU a slice is only queued when it yields.

    Args:
        model:       the serving model; its tensors are read, none is changed.
        adapter:     what is trained; gradients are added to its groups.
        batch:       on the model's device.
        objective:   what is minimised.
        denominator: the effective batch's: the sum of denominator_of over its micro-batches.
        seed:        of this micro-batch's dropout and noise: noise_seed(config.seed, step,
                     micro_batch) of engine/train/noise.py. The same seed gives the same masks.

    Returns:
        The loss before the update and the objective's metrics.
    """
    raise NotImplementedError
    yield


def evaluate_batch(
    model: CausalLM,
    adapter: TrainableAdapter,
    batch: TokenBatch,
    objective: Objective,
) -> Generator[None, None, StepResult]:
    """The same loss and metrics without dropout, noise or gradients."""
    raise NotImplementedError
    yield


def token_logps(
    model: CausalLM, adapter: TrainableAdapter | None, batch: TokenBatch
) -> Generator[None, None, torch.Tensor]:
    """Log-probability of each token with a loss weight: float32 [num_tokens], 0 elsewhere.

    grpo's old_logps when several updates are made from one set of answers. Without an adapter they
    are the base's.
    """
    raise NotImplementedError
    yield
