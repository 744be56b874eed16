"""The loss and the method's metrics on validation data, streamed: no logits are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator

from engine.train.accumulation import BatchSums
from engine.train.answers import DrawAnswers
from engine.train.batches import Sample, micro_batches, read_sample
from engine.train.checkpoint import finite_metrics
from engine.train.forward_backward import evaluate_batch
from engine.train.out_of_memory import with_smaller_batches
from engine.train.run import Run, Slices

WINDOW = 64
"""Samples that are packed into micro-batches together, or prompts answered at once."""


def evaluate(run: Run, draw: DrawAnswers, check_stop: Callable[[], None]) -> Slices[None]:
    """Report on the validation data in run.state, and whether this is the best so far.

    grpo is judged by the mean reward of one answer to each prompt, all else by the loss.

    Args:
        run:        the job.
        draw:       grpo: has prompts answered.
        check_stop: called between micro-batches; what it raises leaves run.state as it was.

    Raises:
        NotEnoughMemory: memory ran out with one sample in each micro-batch.
    """
    if run.config.method == "grpo":
        metrics = yield from _mean_rewards(run, draw)
        value = -metrics["reward"]
    else:
        metrics = yield from _losses(run, check_stop)
        value = metrics["loss"]
    state = run.state
    is_best = math.isfinite(value) and (state.best_value is None or value < state.best_value)
    run.best_before = (state.best_step, state.best_value)
    found = finite_metrics({f"valid_{name}": mean for name, mean in metrics.items()})
    run.state = dataclasses.replace(
        state,
        evaluated_step=state.step,
        best_step=state.step if is_best else state.best_step,
        best_value=value if is_best else state.best_value,
        evaluations_since_best=0 if is_best else state.evaluations_since_best + 1,
        metrics=state.metrics + found,
    )


def _losses(run: Run, check_stop: Callable[[], None]) -> Slices[dict[str, float]]:
    assert run.validation is not None
    sums = BatchSums()
    for start in range(0, run.validation.num_samples, WINDOW):
        stop = min(start + WINDOW, run.validation.num_samples)
        samples = [read_sample(run.validation, index) for index in range(start, stop)]

        def attempt(
            max_tokens: int, samples: list[Sample] = samples
        ) -> Generator[None, None, BatchSums]:
            return _window(run, samples, max_tokens, check_stop)

        sums.add((yield from with_smaller_batches(run, attempt, samples)))
    return {"loss": sums.loss, **sums.means()}


def _window(
    run: Run, samples: list[Sample], max_tokens: int, check_stop: Callable[[], None]
) -> Generator[None, None, BatchSums]:
    sums = BatchSums()
    packing, device = run.config.packing, run.model.device
    for batch in micro_batches(samples, max_tokens, packing=packing, device=device):
        check_stop()
        sums.add((yield from evaluate_batch(run.model, run.adapter, batch, run.objective)))
    return sums


def _mean_rewards(run: Run, draw: DrawAnswers) -> Slices[dict[str, float]]:
    assert run.validation is not None
    sums = BatchSums()
    for start in range(0, run.validation.num_samples, WINDOW):
        stop = min(start + WINDOW, run.validation.num_samples)
        prompts = [run.validation.sequence(index)[0].tolist() for index in range(start, stop)]
        answers = yield from draw(run, prompts, is_evaluation=True)
        sums.add_metrics(answers.metrics)
    return sums.means()
