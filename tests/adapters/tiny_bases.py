"""Tiny random bases and peft's models on them; both implementations' logits. Not a test module."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.api import AdapterRef
from engine.lora_pool import LoraPool
from engine.model import CausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"family": "Mistral", "sliding_window": 6, "head_dim": 16},
    "qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "Qwen3", "head_dim": 16, "attention_bias": True},
}
PROMPTS = [
    [3, 17, 4, 59, 8],
    [11],
    [5, 6, 7, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34],
]
BLOCK_SIZE = 4


@dataclass
class Base:
    """One random model: transformers' and ours, float32."""

    oracle: Any
    model: CausalLM
    folder: Path | None


def random_model(options: dict[str, Any], task: str = "CausalLM") -> Any:
    """A transformers model with random weights; options are those in BASES."""
    options = dict(options)
    family = options.pop("family", "Llama")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options, "num_labels": 1})
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}For{task}")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model.eval()


def randomise(model: Any, seed: int) -> None:
    """Give everything that peft would train random values: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # DoRA's magnitudes, biases
                parameter.data += 0.2 * noise
            else:
                parameter.data = 0.3 * noise


def wait_until_placed(pool: LoraPool, ref: AdapterRef) -> int:
    """acquire, once the loader has finished."""
    while True:
        pool.poll()
        row = pool.acquire(ref)
        if row is not None:
            return row
        for future in list(pool._loader._loading.values()):
            future.exception()


def ref_to(path: Path, uid: int = 1) -> AdapterRef:
    return AdapterRef(uid=uid, generation=1, name=path.name, path=str(path))


def run(
    base: Base,
    pool: LoraPool,
    rows: Sequence[int],
    scales: Sequence[float] | None = None,
    prompts: Any = PROMPTS,
) -> list[torch.Tensor]:
    """Our logits: one prompt per row, all in one batch."""
    scales = scales or [1.0] * len(rows)
    spec = base.model.spec
    lengths = [len(prompt) for prompt in prompts]
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    tables = torch.full((len(prompts), max(num_blocks)), -1, dtype=torch.int32)
    slots: list[int] = []
    first = 0
    for index, count in enumerate(num_blocks):
        tables[index, :count] = torch.arange(first, first + count)
        slots += [first * BLOCK_SIZE + position for position in range(lengths[index])]
        first += count
    batch = types.SimpleNamespace(
        input_ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
    )
    shape = (first, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.num_layers)]
    token_rows = [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)]
    token_scales = [
        scale for scale, length in zip(scales, lengths, strict=True) for _ in range(length)
    ]
    with torch.inference_mode():
        lora = pool.batch(token_rows, token_scales)
        hidden = base.model.forward(batch, caches, lora)
        return list(base.model.logits(hidden, lora).split(lengths))


def oracle_logits(model: Any, prompts: Any = PROMPTS) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
