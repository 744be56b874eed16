"""transformers + peft on the dequantised weights of a loaded model. Not a test module."""

from __future__ import annotations

import copy

import peft
import torch

from engine.head import dense_weight
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batch import TokenBatch, make_batch
from engine.train.config import TrainConfig
from engine.train.forward_backward import forward_backward
from engine.train.objectives import Objective, denominator_of

PREFIX = "base_model.model."


def new_adapter(model: CausalLM, seed: int = 1, **settings: object) -> TrainableAdapter:
    """An adapter whose b is random too, so that every gradient is alive."""
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, **settings}
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    adapter = TrainableAdapter.create(model.spec, config, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for module in adapter.modules.values():
        module.b.normal_(0.0, 0.1, generator=generator)
    return adapter


def make_peft(source, model: CausalLM, adapter: TrainableAdapter):
    """A peft model of source, a transformers model, with the base and the adapter of ours."""
    source = copy.deepcopy(source).to(model.dtype)
    for path in model.spec.linear_shapes():
        if path != "lm_head" or not model.spec.tie_word_embeddings:
            dense = dense_weight(model.base_linear(path).weight)
            source.get_submodule(path).weight.data = dense.to(model.dtype).clone()
    settings = peft.LoraConfig(
        r=adapter.config.rank, lora_alpha=adapter.config.alpha,
        use_rslora=adapter.config.use_rslora, target_modules=list(adapter.modules),
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(source, settings)
    for path, module in adapter.modules.items():
        layer = wrapped.get_submodule(PREFIX + path)
        layer.lora_A["default"].weight.data = module.a.clone()
        layer.lora_B["default"].weight.data = module.b.clone()
    return wrapped


def peft_grads(wrapped, adapter: TrainableAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(gradient of a, gradient of b) by module path."""
    grads = {}
    for path in adapter.modules:
        layer = wrapped.get_submodule(PREFIX + path)
        grads[path] = (
            layer.lora_A["default"].weight.grad,
            layer.lora_B["default"].weight.grad,
        )
    return grads


def our_grads(adapter: TrainableAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same of ours, copied."""
    return {
        path: (module.a_grad.clone(), module.b_grad.clone())
        for path, module in adapter.modules.items()
    }


def assert_grads_close(actual, expected, rtol: float = 1e-5) -> None:
    """Each matrix within rtol of the largest gradient of its kind."""
    for kind in (0, 1):
        largest = max(pair[kind].abs().max().item() for pair in expected.values())
        assert largest > 0
        for path, pair in expected.items():
            difference = (actual[path][kind] - pair[kind]).abs().max().item()
            assert difference <= rtol * largest, (path, "ab"[kind], difference / largest)


def finish(generator):
    """Run a sliced computation to its end: its result."""
    while True:
        try:
            assert next(generator) is None
        except StopIteration as stop:
            return stop.value


def run_step(
    model: CausalLM,
    adapter: TrainableAdapter,
    batches: list[TokenBatch],
    objective: Objective,
    seed: int = 0,
    kept_bytes: int = 0,
) -> list:
    """Gradients of one effective batch; the micro-batches' results."""
    adapter.zero_grads()
    denominator = sum(denominator_of(objective, batch) for batch in batches)
    return [
        finish(
            forward_backward(
                model,
                adapter,
                batch,
                objective,
                denominator=denominator,
                seed=seed + index,
                kept_bytes=kept_bytes,
            )
        )
        for index, batch in enumerate(batches)
    ]


def random_sequences(
    lengths: tuple[int, ...], seed: int = 0, prompt: int = 3, vocab_size: int = 97
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences whose first tokens are a prompt: (input_ids, loss_weights)."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        weights = torch.ones(length)
        weights[: min(prompt, length - 1)] = 0.0
        sequences.append((torch.randint(3, vocab_size, (length,), generator=generator), weights))
    return sequences


def batch_of(sequences, **more: object) -> TokenBatch:
    return make_batch(sequences, "cpu", **more)  # type: ignore[arg-type]


def oracle_logps(wrapped, input_ids: torch.Tensor) -> torch.Tensor:
    """float32 [length - 1]: log-probabilities of tokens 1, 2 ... of one sequence."""
    logits = wrapped(input_ids=input_ids[None].long()).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(1, input_ids[1:, None].long())[:, 0]
