"""One micro-batch there and back, in slices, so that others may run in between.

No context manager is held across a yield: whether gradients are recorded is the thread's state, and
the thread is the server's.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batch import StepResult, TokenBatch
from engine.train.head import HeadResult, run_head
from engine.train.layer import activation_bytes, token_context
from engine.train.layer_pass import LayerGraph, back_through_layers, embed, run_layers
from engine.train.objectives import (
    Metrics,
    Objective,
    denominator_of,
    known_coefficients,
    reward_loss,
    token_loss,
)
from engine.train.pointwise import rms_norm
from engine.train.updates import Updates, fixed_updates, training_updates

KEPT_BYTES = 512 << 20
"""Of activations that need not be computed again."""


def forward_backward(
    model: CausalLM,
    adapter: TrainableAdapter,
    batch: TokenBatch,
    objective: Objective,
    *,
    denominator: float,
    seed: int,
    kept_bytes: int = KEPT_BYTES,
) -> Generator[None, None, StepResult]:
    """Add a micro-batch's gradients to the adapter's.

    Yields None between slices: each is half a layer forward, half a layer backward, or some rows of
    the head. On a GPU a slice is only queued when it yields.

    Args:
        model:       the serving model; its tensors are read, none is changed.
        adapter:     what is trained; gradients are added to its groups.
        batch:       on the model's device.
        objective:   what is minimised.
        denominator: the effective batch's: the sum of denominator_of over its micro-batches.
        seed:        of this micro-batch's dropout and noise: noise_seed(config.seed, step,
                     micro_batch) of engine/train/noise.py. The same seed gives the same masks.
        kept_bytes:  memory for activations kept instead of computed again; it changes no bit.

    Returns:
        The loss before the update and the objective's metrics.
    """
    assert not torch.is_inference_mode_enabled(), "there are no gradients in inference mode"
    reference = yield from _reference_logps(model, batch, objective)
    updates = training_updates(adapter, seed=seed, denominator=denominator)
    context = token_context(model, batch)
    hidden = embed(model, batch, adapter.config.neftune_alpha, seed)
    num_kept = kept_bytes // activation_bytes(model, batch, updates)
    saved: list[Tensor | LayerGraph] = []
    hidden = yield from run_layers(model, hidden, context, updates, saved, num_kept)
    if objective.method == "reward":
        loss, metrics, grad = _score_gradient(model, adapter, batch, hidden, updates.grad_scale)
    else:
        loss, metrics, grad = yield from _token_gradient(model, batch, objective, hidden, reference)
    del hidden
    yield
    yield from back_through_layers(model, saved, grad, context, updates)
    return _result(objective, batch, loss, metrics)


def evaluate_batch(
    model: CausalLM, adapter: TrainableAdapter, batch: TokenBatch, objective: Objective
) -> Generator[None, None, StepResult]:
    """The same loss and metrics without dropout, noise or gradients."""
    reference = yield from _reference_logps(model, batch, objective)
    hidden = yield from _run(model, batch, fixed_updates(adapter))
    with torch.no_grad():
        if objective.method == "reward":
            assert adapter.score is not None, "no score head"
            scores = _scores(model, adapter.score, hidden[_last_tokens(batch)])
            loss, metrics = reward_loss(scores)
            return _result(objective, batch, loss, metrics)
    found = yield from _label_logps(model, batch, hidden, objective.temperature)
    with torch.no_grad():
        loss, metrics = token_loss(objective, batch, found.logps, reference, found.is_correct)
    return _result(objective, batch, loss, metrics)


def token_logps(
    model: CausalLM,
    adapter: TrainableAdapter | None,
    batch: TokenBatch,
    temperature: float = 1.0,
) -> Generator[None, None, Tensor]:
    """Log-probability of each token with a loss weight: float32 [num_tokens], 0 elsewhere.

    grpo's old_logps when several updates are made from one set of answers. Without an adapter they
    are the base's.
    """
    hidden = yield from _run(model, batch, fixed_updates(adapter))
    found = yield from _label_logps(model, batch, hidden, temperature)
    with torch.no_grad():
        result = torch.zeros_like(batch.loss_weights)
        result[batch.label_indices] = found.logps
        return result


def _reference_logps(
    model: CausalLM, batch: TokenBatch, objective: Objective
) -> Generator[None, None, Tensor | None]:
    """float32 [num_labels] of the frozen reference, where the objective needs it."""
    if not objective.needs_reference:
        return None
    hidden = yield from _run(model, batch, fixed_updates(objective.reference))
    found = yield from _label_logps(model, batch, hidden, objective.temperature)
    return found.logps


def _run(model: CausalLM, batch: TokenBatch, updates: Updates) -> Generator[None, None, Tensor]:
    """Forward alone: the residual stream after the last layer."""
    context = token_context(model, batch)
    hidden = embed(model, batch, 0.0, 0)
    return (yield from run_layers(model, hidden, context, updates))


def _label_logps(
    model: CausalLM, batch: TokenBatch, hidden: Tensor, temperature: float
) -> Generator[None, None, HeadResult]:
    with torch.no_grad():
        rows = _normed(model, hidden[batch.label_indices - 1])
    labels = batch.input_ids[batch.label_indices]
    return (yield from run_head(model, rows, labels, temperature=temperature))


def _token_gradient(
    model: CausalLM,
    batch: TokenBatch,
    objective: Objective,
    hidden: Tensor,
    reference: Tensor | None,
) -> Generator[None, None, tuple[Tensor, Metrics, Tensor]]:
    """(loss, metrics, gradient of the residual stream) of an objective of log-probabilities."""
    predicting = batch.label_indices - 1
    rows = hidden[predicting].requires_grad_()
    with torch.enable_grad():
        normed = _normed(model, rows)
    labels = batch.input_ids[batch.label_indices]
    temperature = objective.temperature
    coefficients = known_coefficients(objective, batch)
    if coefficients is None:
        found = yield from run_head(model, normed.detach(), labels, temperature=temperature)
        logps = found.logps.requires_grad_()
        with torch.enable_grad():
            loss, metrics = token_loss(objective, batch, logps, reference, found.is_correct)
        (coefficients,) = torch.autograd.grad(loss, logps)
    found = yield from run_head(
        model, normed.detach(), labels, temperature=temperature, coefficients=coefficients
    )
    with torch.no_grad():
        loss, metrics = token_loss(objective, batch, found.logps, reference, found.is_correct)
    grad = torch.zeros_like(hidden)
    (grad[predicting],) = torch.autograd.grad(normed, rows, found.grad)
    return loss, metrics, grad


def _score_gradient(
    model: CausalLM,
    adapter: TrainableAdapter,
    batch: TokenBatch,
    hidden: Tensor,
    grad_scale: float,
) -> tuple[Tensor, Metrics, Tensor]:
    """(loss, metrics, gradient of the residual stream) of a reward model; the score head's own
    gradient is added at once.
    """
    assert adapter.score is not None and adapter.score_grad is not None, "no score head"
    last = _last_tokens(batch)
    rows = hidden[last].requires_grad_()
    score = adapter.score.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = reward_loss(_scores(model, score, rows))
    grad = torch.zeros_like(hidden)
    grad[last], score_grad = torch.autograd.grad(loss, (rows, score))
    adapter.score_grad.add_(score_grad, alpha=grad_scale)
    return loss, metrics, grad


def _scores(model: CausalLM, score: Tensor, rows: Tensor) -> Tensor:
    """float32 [n]: a score head's answers for rows [n, hidden_size] of the residual stream."""
    return (_normed(model, rows).float() @ score.t())[:, 0]


def _last_tokens(batch: TokenBatch) -> Tensor:
    return batch.cu_seqlens[1:].long() - 1


def _normed(model: CausalLM, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, model.norm, model.spec.rms_norm_eps)


def _result(objective: Objective, batch: TokenBatch, loss: Tensor, metrics: Metrics) -> StepResult:
    """Scalars to the host, all in one transfer."""
    names = list(metrics)
    loss_sum, *sums = torch.stack(
        [loss.detach(), *(metrics[name][0].detach().float() for name in names)]
    ).tolist()
    return StepResult(
        loss_sum=loss_sum,
        denominator=denominator_of(objective, batch),
        num_tokens=batch.num_tokens,
        metrics={name: (value, metrics[name][1]) for name, value in zip(names, sums, strict=True)},
    )
