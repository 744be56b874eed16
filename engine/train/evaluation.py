"""The loss and the method's metrics on validation data, streamed: no logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Generator

from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batches import Sample, micro_batches, read_sample
from engine.train.forward_backward import evaluate_batch
from engine.train.objectives import Objective
from engine.train.step import BatchSums, with_smaller_batches
from engine.train.token_dataset import TokenDataset

WINDOW = 64
"""Samples that are packed into micro-batches together."""


def evaluate(
    model: CausalLM,
    adapter: TrainableAdapter,
    dataset: TokenDataset,
    objective: Objective,
    *,
    max_tokens: int,
    check_stop: Callable[[], None],
) -> Generator[None, None, tuple[BatchSums, int]]:
    """Run all validation data once; yields between slices.

    Args:
        model:      the base.
        adapter:    as it is now; its config says whether samples share micro-batches.
        dataset:    of the kind that the objective takes.
        objective:  what is reported.
        max_tokens: of a micro-batch.
        check_stop: called before each micro-batch; what it raises ends the evaluation.

    Returns:
        (sums over all samples, max_tokens or less where memory ran out).

    Raises:
        NotEnoughMemory: memory ran out with one sample in each micro-batch.
    """
    packing = adapter.config.packing
    sums = BatchSums()
    for start in range(0, dataset.num_samples, WINDOW):
        stop = min(start + WINDOW, dataset.num_samples)
        samples = [read_sample(dataset, index) for index in range(start, stop)]

        def attempt(
            tokens: int, samples: list[Sample] = samples
        ) -> Generator[None, None, BatchSums]:
            window = BatchSums()
            for batch in micro_batches(samples, tokens, packing=packing, device=model.device):
                check_stop()
                window.add((yield from evaluate_batch(model, adapter, batch, objective)))
            return window

        window, max_tokens = yield from with_smaller_batches(
            attempt, samples, max_tokens, packing=packing
        )
        sums.add(window)
    return sums, max_tokens
