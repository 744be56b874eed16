"""Which samples make up which optimizer step, and how they share micro-batches.

All of it is a function of (lengths, seed, epoch), so a position in the data is a step's number and
nothing else has to be remembered to go on exactly. A step's batch is what the optimizer sees; it
runs through the layers in micro-batches of whole samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.train.batch import TokenBatch, make_batch
from engine.train.noise import noise_seed
from engine.train.token_dataset import TokenDataset

LENGTH_POOL = 50
"""group_by_length: batches whose samples are sorted among each other; more would be less random."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What must stay together in one micro-batch: a sequence, or the two of a pair."""

    sequences: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(input_ids int32 [length], loss_weights float32 [length]) each."""
    advantage: float | None = None
    """grpo: of its one sequence."""

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids, _ in self.sequences)


def read_sample(dataset: TokenDataset, index: int) -> Sample:
    """One sample of a data set."""
    if dataset.kind == "preference":
        return Sample((dataset.sequence(2 * index), dataset.sequence(2 * index + 1)))
    return Sample((dataset.sequence(index),))


def sample_lengths(dataset: TokenDataset) -> torch.Tensor:
    """int64 [num_samples]: tokens of each sample, of both sequences of a pair."""
    lengths = dataset.offsets.diff()
    return lengths.view(-1, 2).sum(dim=1) if dataset.kind == "preference" else lengths


def epoch_batches(
    lengths: torch.Tensor, *, batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """The samples of each step of one epoch, every sample once; the last batch may be smaller.

    The longest sample is in the first batch of the run: what does not fit in memory does not fit
    at once.

    Args:
        lengths:         int64 [num_samples].
        batch_size:      samples of a step.
        seed, epoch:     of the order.
        group_by_length: samples of like length come together; the batches come in random order all
                         the same, or the loss would go up and down with them.
    """
    generator = torch.Generator().manual_seed(noise_seed(seed, "order", epoch))
    order = torch.randperm(lengths.numel(), generator=generator)
    if group_by_length:
        pools = torch.split(order, batch_size * LENGTH_POOL)
        order = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
    batches = [batch.tolist() for batch in torch.split(order, batch_size)]
    if group_by_length:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    if epoch == 0:
        _bring_forward(batches, int(lengths.argmax()), group_by_length)
    return batches


def pack(lengths: Sequence[int], max_tokens: int, *, packing: bool) -> list[list[int]]:
    """Distribute a batch's samples over micro-batches, the largest micro-batch first.

    Args:
        lengths:    tokens of each sample.
        max_tokens: of a micro-batch; a longer sample has one to itself.
        packing:    False: every sample has one to itself.

    Returns:
        Indices into lengths, each once; first-fit by decreasing length.
    """
    bins: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = (i for i, tokens in enumerate(filled) if tokens + lengths[index] <= max_tokens)
        target = next(room, None) if packing else None
        if target is None:
            bins.append([index])
            filled.append(lengths[index])
        else:
            bins[target].append(index)
            filled[target] += lengths[index]
    return [bins[i] for i in sorted(range(len(bins)), key=lambda i: (-filled[i], i))]


def join(samples: Sequence[Sample], device: torch.device) -> TokenBatch:
    """One micro-batch of these samples."""
    advantages = [sample.advantage for sample in samples if sample.advantage is not None]
    return make_batch(
        [sequence for sample in samples for sequence in sample.sequences],
        device,
        advantages=advantages or None,
    )


def micro_batches(
    samples: Sequence[Sample], max_tokens: int, *, packing: bool, device: torch.device
) -> list[TokenBatch]:
    """A batch's samples as what runs through the layers, one after another."""
    plan = pack([sample.num_tokens for sample in samples], max_tokens, packing=packing)
    return [join([samples[index] for index in members], device) for members in plan]


def _bring_forward(batches: list[list[int]], index: int, group_by_length: bool) -> None:
    """Let sample `index` be in the first batch: its batch moves, or it changes places with one."""
    home = next(i for i, batch in enumerate(batches) if index in batch)
    if home == 0:
        return
    if group_by_length:
        batches[0], batches[home] = batches[home], batches[0]
    else:
        place = batches[home].index(index)
        batches[0][0], batches[home][place] = index, batches[0][0]
