"""The output head in training: log-probabilities and their gradient, some rows at a time.

Logits exist for one chunk of rows, never for a batch: at 32,000 words a batch's would be larger
than all activations of a layer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model import CausalLM
from engine.train.projection import base_projection, projection_backward
from kernels.label_logps import label_logps

LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 32 << 20}
"""Of one chunk's logits, counted as float32: enough to keep the device busy. A chunk is two slices,
there and back, which should be short on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadResult:
    """What the head says about some labels."""

    logps: Tensor
    """float32 [n]."""
    is_correct: Tensor
    """bool [n]: the label is the most probable token."""
    grad: Tensor | None
    """[n, hidden_size], of the normed hidden states, where coefficients were given."""


def run_head(
    model: CausalLM,
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    coefficients: Tensor | None = None,
) -> Generator[None, None, HeadResult]:
    """Log-probabilities of labels; with coefficients, the gradient of their weighted sum besides.

    Args:
        hidden:       [n, hidden_size], after the final norm, of the tokens that predict.
        labels:       int64 [n].
        temperature:  logits are divided by it.
        coefficients: float32 [n], the loss's slope at each log-probability.
    """
    num_rows = max(1, LOGITS_BYTES[hidden.device.type] // (4 * model.spec.vocab_size))
    logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    is_correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    grad = None if coefficients is None else torch.empty_like(hidden)
    for start in range(0, len(hidden), num_rows):
        yield  # before, not after: a slice of the layers ends here
        rows = slice(start, start + num_rows)
        with torch.no_grad():
            logits = base_projection(hidden[rows], model.lm_head)
            slopes = None if coefficients is None else coefficients[rows]
            logps[rows], is_correct[rows] = label_logps(logits, labels[rows], slopes, temperature)
        if grad is not None:
            yield
            with torch.no_grad():  # the logits have become their own gradient
                grad[rows] = projection_backward(logits, model.lm_head)
    return HeadResult(logps, is_correct, grad)
