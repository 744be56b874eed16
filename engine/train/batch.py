"""One micro-batch of training: whole sequences, flat, one after another; they never see each other.

A loss weight belongs to the token that is predicted, so a sequence's first token has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What runs through the layers at once. Of preferences, sequences 2i and 2i + 1 are a pair."""

    input_ids: torch.Tensor
    """int64 [num_tokens]."""
    positions: torch.Tensor
    """int64 [num_tokens], from 0 in each sequence."""
    cu_seqlens: torch.Tensor
    """int32 [num_sequences + 1], prefix sums of the lengths."""
    loss_weights: torch.Tensor
    """float32 [num_tokens]; 0 at each sequence's first token."""
    lengths: tuple[int, ...]
    """[num_sequences], the same as cu_seqlens says, known to the host."""
    label_indices: torch.Tensor
    """int64 [num_labels]: where loss_weights is not 0."""
    label_sequences: torch.Tensor
    """int64 [num_labels]: the sequence of each of these tokens."""
    advantages: torch.Tensor | None = None
    """grpo: float32 [num_sequences]."""
    old_logps: torch.Tensor | None = None
    """grpo: float32 [num_tokens], each token's log-probability when the answer was drawn; None: the
    policy is still the one that drew it."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one micro-batch gave. Sums, so that those of several micro-batches may be added."""

    loss_sum: float
    """The loss times its denominator's share: divide the sum by the effective batch's."""
    denominator: float
    """This micro-batch's share: its loss weights, or its pairs; objectives.py's denominator_of."""
    num_tokens: int
    """All tokens that ran through the layers, prompts among them."""
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(sum, count) by name: "accuracy", "reward_margin" ...; a mean is sum / count."""


def make_batch(
    sequences: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str,
    *,
    advantages: Sequence[float] | None = None,
    old_logps: Sequence[torch.Tensor] | None = None,
) -> TokenBatch:
    """Join sequences.

    Args:
        sequences:  (input_ids [length], loss_weights [length]) each, as TokenDataset gives them.
        device:     where the tensors go.
        advantages: grpo: one per sequence.
        old_logps:  grpo: float32 [length] per sequence.
    """
    lengths = tuple(ids.numel() for ids, _ in sequences)
    assert lengths and min(lengths) > 0, "an empty batch or an empty sequence"
    weights = torch.cat([weights for _, weights in sequences]).float()
    starts = torch.tensor((0, *lengths)).cumsum(0)
    weights[starts[:-1]] = 0.0
    label_indices = weights.nonzero().view(-1)
    label_sequences = torch.bucketize(label_indices, starts[1:], right=True)
    return TokenBatch(
        input_ids=torch.cat([ids for ids, _ in sequences]).long().to(device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=starts.int().to(device),
        loss_weights=weights.to(device),
        lengths=lengths,
        label_indices=label_indices.to(device),
        label_sequences=label_sequences.to(device),
        advantages=None if advantages is None else torch.tensor(advantages, device=device).float(),
        old_logps=None if old_logps is None else torch.cat(list(old_logps)).float().to(device),
    )
