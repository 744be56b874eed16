"""transformers with bitsandbytes on the shapes of bench/gpu_e2e.py: random NF4 weights with double
quantisation, made on the device, decoded greedily with its own cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.random_model import SCALE, VOCAB_SIZE, config_of

NUM_STEPS = 32


def measure_peer(shape: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of decode and prefill; one row that says so where bitsandbytes is not installed."""
    try:
        model = make_model(shape, torch.device(options.device))
    except ImportError as error:
        yield {"what": "peer", "skipped": str(error)}
        return
    num_steps = min(NUM_STEPS, options.steps)
    for batch in options.batches:
        try:
            seconds = decode_s(model, batch, options.context, num_steps)
        except torch.OutOfMemoryError:
            yield {"what": "peer decode", "batch": batch, "skipped": "out of memory"}
            continue
        speed, ms = round(batch / seconds, 1), round(1e3 * seconds, 3)
        yield {"what": "peer decode", "batch": batch, "tokens_per_s": speed, "ms_per_step": ms}
    for num_tokens in options.prompts:
        try:
            seconds = min(prefill_s(model, num_tokens) for _ in range(3))
        except torch.OutOfMemoryError:
            yield {"what": "peer prefill", "tokens": num_tokens, "skipped": "out of memory"}
            continue
        speed = round(num_tokens / seconds, 1)
        yield {"what": "peer prefill", "tokens": num_tokens, "tokens_per_s": speed}


def make_model(shape: str, device: torch.device) -> Any:
    """LlamaForCausalLM with every projection a Linear4bit.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    import bitsandbytes
    import transformers

    config = transformers.LlamaConfig(**config_of(shape))
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(block, name, _linear_4bit(bitsandbytes, module, device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            path, _, leaf = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            value = value.normal_(0.0, SCALE) if value.dim() > 1 else value.fill_(1.0)
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    model.model.rotary_emb = rotary.to(device)
    return model.eval()


def _linear_4bit(bitsandbytes: Any, module: torch.nn.Linear, device: torch.device) -> Any:
    linear = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    shape = (module.out_features, module.in_features)
    dense = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, SCALE)
    linear.weight = bitsandbytes.nn.Params4bit(
        dense, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    return linear


@torch.inference_mode()
def decode_s(model: Any, batch: int, context: int, num_steps: int) -> float:
    """Seconds of a forward pass of one token for each of `batch` sequences, argmax included."""
    ids = torch.randint(3, VOCAB_SIZE, (batch, context), device=model.device)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, :1]
    started_s = time.perf_counter()
    for step in range(num_steps + 2):
        if step == 2:  # the first ones warm up
            _synchronize(model)
            started_s = time.perf_counter()
        output = model(token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    _synchronize(model)
    return (time.perf_counter() - started_s) / num_steps


@torch.inference_mode()
def prefill_s(model: Any, num_tokens: int) -> float:
    """Seconds for a prompt."""
    ids = torch.randint(3, VOCAB_SIZE, (1, num_tokens), device=model.device)
    _synchronize(model)
    started_s = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    _synchronize(model)
    return time.perf_counter() - started_s


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
