"""Log-probabilities of labels and their gradient, from logits that are used up in the making."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import check, dispatch
from kernels.nf4 import FLOAT_DTYPES


def label_logps(
    logits: Tensor, labels: Tensor, slopes: Tensor | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of a label in each row.

    Args:
        logits:      float32, bfloat16 or float16 [n, vocab_size], contiguous. With slopes it is
                     overwritten: by the gradient of sum(slopes * log-probabilities).
        labels:      int64 [n].
        slopes:      float32 [n], or None.
        temperature: logits are divided by it.

    Returns:
        (float32 [n], bool [n]: whether the label is the most probable, of several the first).

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check(logits.dim() == 2, "logits.dim()", 2, logits.dim())
    check(logits.dtype in FLOAT_DTYPES, "logits.dtype", FLOAT_DTYPES, logits.dtype)
    check(logits.is_contiguous(), "logits.stride()", "contiguous", logits.stride())
    check(labels.shape == logits.shape[:1], "labels.shape", (len(logits),), tuple(labels.shape))
    check(labels.dtype == torch.int64, "labels.dtype", torch.int64, labels.dtype)
    if slopes is not None:
        check(slopes.shape == labels.shape, "slopes.shape", (len(logits),), tuple(slopes.shape))
        check(slopes.dtype == torch.float32, "slopes.dtype", torch.float32, slopes.dtype)
    return dispatch("label_logps", label_logps_reference, logits, labels, slopes, temperature)


def label_logps_reference(
    logits: Tensor, labels: Tensor, slopes: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """label_logps in plain PyTorch."""
    scaled = logits.float() / temperature
    own = labels[:, None]
    is_correct = scaled.argmax(-1) == labels
    normaliser = scaled.logsumexp(-1, keepdim=True)
    logps = (scaled.gather(1, own) - normaliser)[:, 0]
    if slopes is not None:
        # d logp(label) / d logits = (one-hot(label) - softmax) / temperature
        factors = slopes[:, None] / temperature
        grad = scaled.sub_(normaliser).exp_().mul_(-factors)
        logits.copy_(grad.scatter_add_(1, own, factors))
    return logps, is_correct
