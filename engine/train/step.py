"""One effective batch through the layers, in micro-batches that fit in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine.errors import NotEnoughMemory
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batch import StepResult
from engine.train.batches import Sample, micro_batches, pack
from engine.train.forward_backward import forward_backward
from engine.train.noise import noise_seed
from engine.train.objectives import Objective, denominator_of

T = TypeVar("T")
MEMORY_MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
"""In a plain RuntimeError, they mean that memory ran out."""


@dataclass(slots=True)
class BatchSums:
    """What the micro-batches of one batch have given so far."""

    loss_sum: float = 0.0
    denominator: float = 0.0
    num_tokens: int = 0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """(sum, count) by name."""

    def add(self, result: StepResult | BatchSums) -> None:
        self.loss_sum += result.loss_sum
        self.denominator += result.denominator
        self.num_tokens += result.num_tokens
        self.add_metrics(result.metrics)

    def add_metrics(self, metrics: dict[str, tuple[float, float]]) -> None:
        for name, (amount, count) in metrics.items():
            total, number = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (total + amount, number + count)

    @property
    def loss(self) -> float:
        """The batch's mean loss."""
        return self.loss_sum / self.denominator

    def means(self) -> dict[str, float]:
        """The method's own metrics."""
        return {name: total / count for name, (total, count) in self.metrics.items() if count}


def accumulate_gradients(
    model: CausalLM,
    adapter: TrainableAdapter,
    samples: Sequence[Sample],
    objective: Objective,
    *,
    max_tokens: int,
    step: int,
    check_stop: Callable[[], None],
) -> Generator[None, None, BatchSums]:
    """Leave a batch's gradients in the adapter, and no others; yields between slices.

    Args:
        model:      the base.
        adapter:    what is trained; its config says how.
        samples:    of the batch.
        objective:  what is minimised.
        max_tokens: of a micro-batch.
        step:       the step's number, which noise depends on.
        check_stop: called before each micro-batch; what it raises ends the step.
    """
    config = adapter.config
    batches = micro_batches(samples, max_tokens, packing=config.packing, device=model.device)
    denominator = sum(denominator_of(objective, batch) for batch in batches)
    adapter.zero_grads()
    sums = BatchSums()
    for number, batch in enumerate(batches):
        check_stop()
        seed = noise_seed(config.seed, step, number)
        result = yield from forward_backward(
            model, adapter, batch, objective, denominator=denominator, seed=seed
        )
        sums.add(result)
    return sums


def with_smaller_batches(
    attempt: Callable[[int], Generator[None, None, T]],
    samples: Sequence[Sample],
    max_tokens: int,
    *,
    packing: bool,
) -> Generator[None, None, tuple[T, int]]:
    """Repeat an attempt with half the tokens in a micro-batch whenever memory runs out.

    Args:
        attempt:    called with the tokens of a micro-batch at most; undoes what it has done when it
            is begun anew.
        samples:    what it runs.
        max_tokens: to begin with.
        packing:    whether samples share micro-batches at all.

    Returns:
        (the attempt's result, the tokens it was done with).

    Raises:
        NotEnoughMemory: memory ran out with one sample in each micro-batch.
    """
    lengths = [sample.num_tokens for sample in samples]
    while True:
        try:
            return (yield from attempt(max_tokens)), max_tokens
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error)
        # Outside the except block: the error no longer holds the frames that hold the tensors.
        release_memory()
        if len(pack(lengths, max_tokens, packing=packing)) == len(samples):
            raise NotEnoughMemory(
                f"Training ran out of memory with one sample at a time; the longest has "
                f"{max(lengths)} tokens. Leave the longest out, lower max_seq_len or rank, or give "
                f"the server less memory for its KV cache. ({reason})"
            )
        max_tokens = _next_smaller(lengths, max_tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


def release_memory() -> None:
    """Give back what is no longer used, so that serving finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _next_smaller(lengths: Sequence[int], max_tokens: int) -> int:
    """Half as many tokens as the largest micro-batch had."""
    largest = sum(lengths[index] for index in pack(lengths, max_tokens, packing=True)[0])
    return max(1, largest // 2)
