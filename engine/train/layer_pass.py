"""All layers, forward and backward, half a layer at a time.

Forward keeps the input of each layer; backward takes the layers in reverse and computes one of them
again, this time with a graph. (Gradient checkpointing as the loop's shape.) As many of the last
layers as are asked for keep their graph from the forward pass and are spared that.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.embedding import look_up
from engine.model import CausalLM
from engine.train.batch import TokenBatch
from engine.train.layer import TokenContext, attention_half, mlp_half
from engine.train.noise import noise_seed, uniform_noise
from engine.train.updates import Updates


@dataclass(frozen=True, slots=True, eq=False)
class LayerGraph:
    """One layer as autograd recorded it, in two halves; [num_tokens, hidden_size] each."""

    before: Tensor
    between: Tensor
    middle: Tensor
    """between's values, where the MLP's half begins."""
    after: Tensor


def embed(model: CausalLM, batch: TokenBatch, neftune_alpha: float, seed: int) -> Tensor:
    """[num_tokens, hidden_size], with NEFTune's noise (arXiv:2310.05914) where it is asked for."""
    with torch.no_grad():
        hidden = look_up(model.embed_tokens, batch.input_ids)
        if neftune_alpha:
            scales = [
                neftune_alpha / math.sqrt(length * model.spec.hidden_size)
                for length in batch.lengths
                for _ in range(length)
            ]
            by_token = torch.tensor(scales, device=hidden.device)
            hidden = hidden + uniform_noise(hidden, by_token, noise_seed(seed, "embedding"))
        return hidden


def run_layers(
    model: CausalLM,
    hidden: Tensor,
    context: TokenContext,
    updates: Updates,
    saved: list[Tensor | LayerGraph] | None = None,
    num_kept: int = 0,
) -> Generator[None, None, Tensor]:
    """The residual stream after the last layer. Where something is to be saved: the graphs of the
    last num_kept layers, the inputs of those below.
    """
    for index in range(model.spec.num_layers):
        if saved is not None and index >= model.spec.num_layers - num_kept:
            graph = yield from record_layer(model, index, hidden, context, updates)
            saved.append(graph)
            hidden = graph.after.detach()
            continue
        if saved is not None:
            saved.append(hidden)
        with torch.no_grad():
            hidden = attention_half(model, index, hidden, context, updates)
        yield
        with torch.no_grad():
            hidden = mlp_half(model, index, hidden, updates)
        yield
    return hidden


def record_layer(
    model: CausalLM, index: int, hidden: Tensor, context: TokenContext, updates: Updates
) -> Generator[None, None, LayerGraph]:
    """Run a layer with a graph."""
    before = hidden.detach().requires_grad_()
    with torch.enable_grad():
        between = attention_half(model, index, before, context, updates)
    yield
    middle = between.detach().requires_grad_()
    with torch.enable_grad():
        after = mlp_half(model, index, middle, updates)
    yield
    return LayerGraph(before, between, middle, after)


def back_through_layers(
    model: CausalLM,
    saved: list[Tensor | LayerGraph],
    grad: Tensor,
    context: TokenContext,
    updates: Updates,
) -> Generator[None, None, None]:
    """From the gradient of the last layer's output down to the lowest layer that is adapted."""
    lowest = min(
        index for index, layer in enumerate(model.layers) if updates.touches(layer.projections)
    )
    for index in reversed(range(lowest, model.spec.num_layers)):
        graph = saved.pop()
        if isinstance(graph, Tensor):
            graph = yield from record_layer(model, index, graph, context, updates)
        (grad,) = torch.autograd.grad(graph.after, graph.middle, grad)
        yield
        (grad,) = torch.autograd.grad(graph.between, graph.before, grad)
        del graph
        yield
