"""One effective batch through the layers, micro-batch after micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batch import StepResult
from engine.train.batches import Sample, micro_batches
from engine.train.forward_backward import forward_backward
from engine.train.noise import noise_seed
from engine.train.objectives import Objective, denominator_of

Metrics = dict[str, tuple[float, float]]
"""(sum, count) by name."""


@dataclass(slots=True)
class BatchSums:
    """What the micro-batches of one batch have given so far."""

    loss_sum: float = 0.0
    denominator: float = 0.0
    num_tokens: int = 0
    metrics: Metrics = field(default_factory=dict)

    def add(self, result: StepResult | BatchSums) -> None:
        self.loss_sum += result.loss_sum
        self.denominator += result.denominator
        self.num_tokens += result.num_tokens
        self.add_metrics(result.metrics)

    def add_metrics(self, metrics: Metrics) -> None:
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
