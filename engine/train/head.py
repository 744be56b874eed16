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
from engine.train.projection import projection_backward

LOGITS_BYTES = 32 << 20
"""Of one chunk's float32 logits."""


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
    num_rows = max(1, LOGITS_BYTES // (4 * model.spec.vocab_size))
    logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    is_correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    grad = None if coefficients is None else torch.empty_like(hidden)
    for start in range(0, len(hidden), num_rows):
        rows = slice(start, start + num_rows)
        with torch.no_grad():
            logits = model.lm_head(hidden[rows], None).float()
            if temperature != 1.0:
                logits = logits / temperature
            own = labels[rows, None]
            is_correct[rows] = logits.argmax(-1) == own[:, 0]
            normaliser = logits.logsumexp(-1, keepdim=True)
            logps[rows] = (logits.gather(1, own) - normaliser)[:, 0]
            if grad is not None and coefficients is not None:
                # d logp(label) / d logits = one-hot(label) - softmax
                slopes = coefficients[rows, None] / temperature
                grad_logits = logits.sub_(normaliser).exp_().mul_(-slopes)
                grad_logits.scatter_add_(1, own, slopes)
                grad[rows] = projection_backward(grad_logits.to(hidden.dtype), model.lm_head)
        yield
    return HeadResult(logps, is_correct, grad)
