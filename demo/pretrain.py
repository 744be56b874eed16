"""The base model: its shape, and its 4-bit copy in the bitsandbytes format."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.quantize import quantize_checkpoint

MODEL_CARD = Path(__file__).parent / "model_card.md"


def new_base(vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A small LLaMA with grouped-query attention and a tied head; widths are multiples of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    return model


def quantise(source: Path, target: Path) -> None:
    """NF4 with double quantisation for the linear layers, in a folder that replaces `target`."""
    shutil.rmtree(target, ignore_errors=True)
    with tqdm(desc="quantise", unit="B", unit_scale=True) as bar:

        def show(_stage: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        quantize_checkpoint(source, target, progress=show)
    (target / "README.md").write_bytes(MODEL_CARD.read_bytes())
