"""Models of random NF4 weights, made on the device: nothing is stored, nothing large travels.

The folder of such a model is config.json and a tokenizer of 32,000 invented words. load_random
stands in for engine/startup.py's load_base: the engine around it is the one that serves.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

import engine.startup
from engine.api import AdapterRef
from engine.config import ModelConfig
from engine.lora import LoraModule, LoraWeights
from engine.memory import estimate_weights_bytes
from engine.model import CausalLM
from engine.model_config import ModelSpec
from engine.weights import LoadedModel
from kernels.nf4 import NESTED_BLOCK, QuantizedWeight

VOCAB_SIZE = 32_000
MAX_LEN = 16_384
SHAPES = {  # hidden, inner, layers, heads
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "65B": (8192, 22016, 80, 64),
    "tiny": (256, 512, 2, 4),
}
LORA_RANK = 16
SCALE = 0.02
"""Of the weights, so that activations neither vanish nor overflow."""


def config_of(shape: str) -> dict[str, object]:
    """config.json of a LLaMA of that shape."""
    hidden, inner, layers, heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": MAX_LEN,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }


def write_folder(shape: str, root: Path, *, with_tokenizer: bool) -> Path:
    """A folder with all of such a model but its weights."""
    folder = root / shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    if with_tokenizer:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, VOCAB_SIZE))]
        vocab = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)
    return folder


def use_random_weights() -> None:
    """From now on this process's engines make their weights up."""
    engine.startup.load_base = load_random


def load_random(
    config: ModelConfig, folder: Path, progress: Callable[[str, int, int], None]
) -> LoadedModel:
    """A model of config.json's shapes on the device that --device says."""
    device = engine.startup._device(config)
    dtype = torch.bfloat16
    spec = ModelSpec.from_folder(folder)
    model = CausalLM(spec, device=device, dtype=dtype)
    shapes = spec.tensor_shapes()
    quantized = spec.quantizable_weights()
    generator = torch.Generator(device).manual_seed(0)
    for done, (name, shape) in enumerate(shapes.items()):
        progress("Making weights up", done, len(shapes))
        if name in quantized:
            out_features, in_features = shape
            value: torch.Tensor | QuantizedWeight = random_weight(
                (out_features, in_features), dtype, device, generator
            )
        elif len(shape) == 1:
            value = torch.ones(shape, dtype=dtype, device=device)
        else:
            value = torch.empty(shape, dtype=dtype, device=device)
            value.normal_(0.0, SCALE, generator=generator)
        model.set_tensor(name, value)
    model.finish(config.lm_head_dtype)
    return LoadedModel(
        model=model,
        spec=spec,
        fingerprint="random",
        weights_bytes=estimate_weights_bytes(spec, "nf4", dtype),
        quantization="nf4",
        notes=("The weights are random.",),
    )


def random_weight(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> QuantizedWeight:
    """Random codes under scales around SCALE: no dense weight is ever made."""
    numel = shape[0] * shape[1]
    num_groups = -(-numel // 64)

    def codes(count: int) -> torch.Tensor:
        return torch.randint(
            0, 256, (count,), dtype=torch.uint8, device=device, generator=generator
        )

    return QuantizedWeight(
        packed=codes(-(-numel // 2)),
        absmax=codes(num_groups),
        nested_absmax=torch.full((-(-num_groups // NESTED_BLOCK),), 0.01, device=device),
        nested_offset=torch.tensor(2.0 * SCALE, device=device),
        shape=shape,
        dtype=dtype,
    )


@functools.cache
def _matrices(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    a = torch.randn(LORA_RANK, in_features, generator=generator) / math.sqrt(in_features)
    b = torch.randn(out_features, LORA_RANK, generator=generator) * 0.01
    return a.bfloat16(), b.bfloat16()


def random_adapter(ref: AdapterRef) -> LoraWeights:
    """Rank 16 on all linear layers of the model in ref.path. On the device each adapter has memory
    of its own, though all hold the same numbers."""
    shapes = ModelSpec.from_folder(ref.path).linear_shapes()
    modules = {}
    for path, shape in shapes.items():
        if path != "lm_head":
            a, b = _matrices(*shape)
            modules[path] = LoraModule(a=a, b=b)
    return LoraWeights(modules=modules)
