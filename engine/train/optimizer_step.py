"""One optimizer step: samples, gradients, clipping, update; or a step that is skipped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator

from engine.errors import EngineError
from engine.train.accumulation import BatchSums, Metrics, accumulate_gradients
from engine.train.answers import DrawAnswers
from engine.train.batches import Sample, read_sample
from engine.train.checkpoint import finite_metrics
from engine.train.optimizer import clip_scale
from engine.train.out_of_memory import with_smaller_batches
from engine.train.run import Run, Slices
from engine.train.schedule import learning_rate

MAX_SKIPPED_IN_A_ROW = 10
"""Steps without finite numbers after which a run is taken to be lost."""


def train_step(
    run: Run, draw: DrawAnswers, check_stop: Callable[[], None], clock: Callable[[], float]
) -> Slices[None]:
    """Do the run's next step; run.state is replaced when it is done.

    Args:
        run:        the job.
        draw:       grpo: has prompts answered.
        check_stop: called between micro-batches; what it raises leaves run.state as it was.
        clock:      seconds.

    Raises:
        EngineError: too many steps were skipped, or memory ran out for a single sample.
    """
    started_s = clock()
    samples, answers = yield from _next_samples(run, draw)

    def attempt(max_tokens: int) -> Generator[None, None, BatchSums]:
        return accumulate_gradients(
            run.model, run.adapter, samples, run.objective,
            max_tokens=max_tokens, step=run.state.step, check_stop=check_stop,
        )  # fmt: skip

    sums = yield from with_smaller_batches(run, attempt, samples)
    sums.add_metrics(answers)
    rate = learning_rate(run.config, run.state.step, run.num_steps)
    grad_norm = run.optimizer.grad_norm()
    is_finite = math.isfinite(sums.loss) and math.isfinite(grad_norm)
    if is_finite:
        yield from run.optimizer.update(rate, clip_scale(grad_norm, run.config.max_grad_norm))
    state = dataclasses.replace(
        run.state,
        step=run.state.step + 1,
        trained_tokens=run.state.trained_tokens + sums.num_tokens,
        num_skipped_steps=run.state.num_skipped_steps + (not is_finite),
        skipped_in_a_row=0 if is_finite else run.state.skipped_in_a_row + 1,
    )
    metrics = {
        "train_loss": sums.loss,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "epoch": state.step / run.steps_per_epoch,
        "tokens_per_s": sums.num_tokens / (clock() - started_s),
        "skipped_steps": float(state.num_skipped_steps),
        **sums.means(),
    }
    run.state = dataclasses.replace(state, metrics=finite_metrics(metrics))
    if not is_finite:
        yield run.note("warn", _skipped_message(run, sums.loss, grad_norm))


def _next_samples(
    run: Run, draw: DrawAnswers
) -> Generator[None, None, tuple[list[Sample], Metrics]]:
    """What the next step learns from, and metrics of it that are known already."""
    members = run.batch()
    if run.config.method != "grpo":
        return [read_sample(run.dataset, member) for member in members], {}
    prompts = [run.dataset.sequence(member)[0].tolist() for member in members]
    answers = yield from draw(run, prompts, is_evaluation=False)
    return answers.samples, answers.metrics


def _skipped_message(run: Run, loss: float, grad_norm: float) -> str:
    """Say that a step was skipped.

    Raises:
        EngineError: too many were, one after another.
    """
    state = run.state
    message = (
        f"Step {state.step} was skipped: its loss is {loss} and its gradients' norm {grad_norm}. "
        f"{state.num_skipped_steps} skipped so far."
    )
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise EngineError(
            f"{message} {state.skipped_in_a_row} in a row are too many: lower learning_rate, and "
            f"begin anew or from an earlier checkpoint."
        )
    return message
