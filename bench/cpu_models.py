"""Random models of the benchmark's shapes, and adapters for them, as files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.model_config import ModelSpec
from engine.quantize import quantize_checkpoint
from engine.shard_writer import ShardWriter

VOCAB_SIZE = 32_000
MAX_LEN = 4096
SHAPES = {
    "tiny": {"hidden_size": 256, "inner_size": 512, "layers": 2, "heads": 4, "kv_heads": 4},
    "110M": {"hidden_size": 768, "inner_size": 2048, "layers": 12, "heads": 12, "kv_heads": 12},
    "160M": {"hidden_size": 768, "inner_size": 3072, "layers": 12, "heads": 12, "kv_heads": 12},
    "1.1B": {"hidden_size": 2048, "inner_size": 5632, "layers": 22, "heads": 32, "kv_heads": 4},
}  # fmt: skip
RANK = 16
NUM_ADAPTERS = 8


def config_of(shape: str) -> dict[str, object]:
    """config.json of a LLaMA of that shape."""
    sizes = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["inner_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": MAX_LEN,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def make_model(shape: str, folder: Path) -> None:
    """folder/dense (bfloat16) and folder/nf4 (NF4, double-quantised), unless they are there."""
    dense = folder / "dense"
    if not (dense / "config.json").exists():
        dense.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        (dense / "config.json").write_text(json.dumps(config_of(shape), indent=1))
        writer = ShardWriter(dense)
        for name, size in ModelSpec.from_folder(dense).tensor_shapes().items():
            if len(size) == 1:
                writer.add({name: torch.ones(size, dtype=torch.bfloat16)})
            else:
                values = torch.randn(size, generator=generator, dtype=torch.float32)
                writer.add({name: values.mul_(0.02).bfloat16()})
        writer.finish()
    if not (folder / "nf4").exists():
        quantize_checkpoint(dense, folder / "nf4")


def vocabulary() -> list[str]:
    """Pieces as SentencePiece calls them: three special ones, the bytes, meaningless words."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return pieces + [f"▁w{i}" for i in range(len(pieces), VOCAB_SIZE)]


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of that vocabulary in a model's folder, for its server."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {piece: index for index, piece in enumerate(vocabulary())}
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, seed: int) -> Path:
    """A random PEFT adapter of rank 16 on every projection, unless it is there."""
    target = folder / f"adapter-{seed}"
    if target.exists():
        return target
    spec = ModelSpec.from_folder(folder / "dense")
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for path, (out_features, in_features) in spec.linear_shapes().items():
        if path == "lm_head":
            continue
        a = torch.randn(RANK, in_features, generator=generator) / math.sqrt(in_features)
        b = torch.randn(out_features, RANK, generator=generator) * 0.01
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.bfloat16()
    target.mkdir()
    names = sorted({path.rpartition(".")[2] for path in spec.linear_shapes()} - {"lm_head"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": names,
        "base_model_name_or_path": str(folder / "nf4"),
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors")
    return target
