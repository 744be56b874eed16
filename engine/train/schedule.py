"""The learning rate at each step; the same numbers as transformers' schedules of these names."""

from __future__ import annotations

import math

from engine.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """The rate of one step.

    Args:
        config:    resolved: learning_rate is filled in; lr_schedule and warmup_ratio are used.
        step:      steps done before this one; the first of a warm-up has a rate of 0.
        num_steps: of the whole run.
    """
    assert config.learning_rate is not None, "the config is not resolved"
    return config.learning_rate * _factor(config, step, num_steps)


def _factor(config: TrainConfig, step: int, num_steps: int) -> float:
    # A single step has no warm-up: its rate would be 0.
    num_warmup_steps = math.ceil(config.warmup_ratio * num_steps) if num_steps > 1 else 0
    if step < num_warmup_steps:
        return step / num_warmup_steps
    num_falling_steps = max(1, num_steps - num_warmup_steps)
    if config.lr_schedule == "linear":
        return max(0.0, (num_steps - step) / num_falling_steps)
    if config.lr_schedule == "cosine":
        progress = (step - num_warmup_steps) / num_falling_steps
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return 1.0
