"""What a run uses where its config leaves the choice: the paper's settings, less for small data."""

from __future__ import annotations

import dataclasses
import math

import torch

from engine.errors import RequestError
from engine.memory import available_device_bytes
from engine.model_config import ModelSpec
from engine.train.config import MAX_NUMBER, TrainConfig

LARGE_MODEL = 20_000_000_000
"""Parameters from which the paper's smaller learning rate and dropout hold (33B and 65B)."""
PAPER_BATCH_SIZE = 16
STEPS_PER_EPOCH = 8
"""At least so many where the data are few: the batch shrinks for it."""
ENOUGH_STEPS = 100
"""Optimizer steps that a run should have; epochs are added for it."""
MAX_EPOCHS = 10
PAUSES = 10
"""Evaluations, and checkpoints, of a run."""
MEMORY_SHARE = 0.5
"""Of the memory that is free, for a micro-batch's activations."""
MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
"""Enough to keep the machine busy; more would only make serving wait for longer slices."""
MIN_MICRO_BATCH_TOKENS = 64


def resolve(
    config: TrainConfig,
    spec: ModelSpec,
    *,
    num_samples: int,
    max_model_len: int,
    device: torch.device,
) -> TrainConfig:
    """Fill in every field that is None, but early_stopping_patience, whose None means never.

    num_epochs is given back as what max_steps amounts to, where that was set.

    Args:
        config:        as the user gave it.
        spec:          the base.
        num_samples:   of the training data.
        max_model_len: tokens that the base is served with.
        device:        the base's.

    Raises:
        RequestError: max_seq_len is more than the model holds, or there would be no end of steps.
    """
    if config.max_seq_len is not None and config.max_seq_len > max_model_len:
        raise RequestError(
            f"max_seq_len is {config.max_seq_len}, but the model holds {max_model_len} tokens. "
            f"Lower it.",
            param="max_seq_len",
        )
    is_large = num_parameters(spec) >= LARGE_MODEL
    rate, dropout = (1e-4, 0.05) if is_large else (2e-4, 0.1)
    if config.method in ("dpo", "grpo"):
        # The policy is compared with a reference, or with the answers that it drew, without noise.
        rate, dropout = rate / 10, 0.0
    batch_size = config.batch_size or _batch_size(num_samples)
    steps_per_epoch = math.ceil(num_samples / batch_size)
    num_epochs = config.num_epochs or _num_epochs(steps_per_epoch)
    max_steps = config.max_steps or max(1, math.ceil(steps_per_epoch * num_epochs))
    if max_steps >= MAX_NUMBER:
        raise RequestError(
            f"num_epochs is {num_epochs:g}, which makes {max_steps:,} steps. Lower it.",
            param="num_epochs",
        )
    return dataclasses.replace(
        config,
        dropout=dropout if config.dropout is None else config.dropout,
        learning_rate=config.learning_rate or rate,
        batch_size=batch_size,
        num_epochs=max_steps / steps_per_epoch,
        max_steps=max_steps,
        max_seq_len=config.max_seq_len or max_model_len,
        micro_batch_tokens=config.micro_batch_tokens or _micro_batch_tokens(spec, device),
        paged=device.type == "cuda" if config.paged is None else config.paged,
        eval_every_steps=config.eval_every_steps or math.ceil(max_steps / PAUSES),
        save_every_steps=config.save_every_steps or math.ceil(max_steps / PAUSES),
    )


def num_parameters(spec: ModelSpec) -> int:
    """Of the base."""
    return sum(math.prod(shape) for shape in spec.tensor_shapes().values())


def _batch_size(num_samples: int) -> int:
    """The paper's, or the largest power of two that makes STEPS_PER_EPOCH steps."""
    wanted = max(1, num_samples // STEPS_PER_EPOCH)
    return min(PAPER_BATCH_SIZE, 1 << (wanted.bit_length() - 1))


def _num_epochs(steps_per_epoch: int) -> float:
    return float(min(MAX_EPOCHS, max(1, math.ceil(ENOUGH_STEPS / steps_per_epoch))))


def _micro_batch_tokens(spec: ModelSpec, device: torch.device) -> int:
    """What keeps the device busy, if the free memory holds the activations: every layer's input,
    and everything inside one layer.
    """
    one_layer = 16 * spec.hidden_size + 8 * spec.intermediate_size
    token_bytes = spec.dtype.itemsize * (spec.num_layers * spec.hidden_size + one_layer)
    tokens = MICRO_BATCH_TOKENS.get(device.type, MICRO_BATCH_TOKENS["cpu"])
    available_bytes = available_device_bytes(device)
    if available_bytes is not None:
        tokens = min(tokens, int(MEMORY_SHARE * available_bytes / token_bytes))
    return max(tokens, MIN_MICRO_BATCH_TOKENS)
