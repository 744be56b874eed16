"""Tiny random models of each architecture, and the oracles to compare with. Not a test module."""

from __future__ import annotations

import types
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.bnb_format import StoredWeight
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.model import CausalLM
from engine.model_config import ModelSpec
from engine.tensor_plan import plan_tensors
from engine.weights import LoadedModel, load_model

FILE = "model.safetensors"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama_mha_untied_biases": (
        "Llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3_tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    ),
    "llama_head_dim": ("Llama", {"head_dim": 24}),
    # 72 is no multiple of 64: groups straddle rows, and the last group of a tensor may be partial.
    "llama_straddling": (
        "Llama",
        {"hidden_size": 72, "intermediate_size": 101, "num_attention_heads": 6, "head_dim": 12},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "mistral_no_window": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biased": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
}


def make_model(name: str, dtype: torch.dtype = torch.float32, **changes: object):
    """A random transformers model; norms and biases are random too, so that none is a no-op."""
    architecture, options = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 0.0 if parameter_name.endswith("bias") else 1.0
            torch.nn.init.normal_(parameter, centre, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.08)
    return model.to(dtype).eval()


def save_model(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: object):
    """make_model, saved in Hugging Face format; returns the model."""
    model = make_model(name, dtype, **changes)
    model.save_pretrained(folder)
    return model


def load(folder: Path, tmp_path: Path | None = None, **flags: object) -> LoadedModel:
    """load_model on the CPU, by default as the folder is and with the cache in a temporary
    folder.
    """
    flags.setdefault("quantized_cache_dir", str((tmp_path or folder.parent) / "cache"))
    return load_model(ModelConfig(base="x", **flags), folder, "cpu")  # type: ignore[arg-type]


def rewrite(folder: Path, change) -> None:
    """Replace a folder's tensors by change(tensors); None keeps those it has changed in place."""
    tensors = load_file(folder / FILE)
    save_file(change(tensors) or tensors, folder / FILE)


def save_with_bitsandbytes(
    folder: Path, name: str, dtype=torch.bfloat16, *, max_shard_size="5GB", **options
):
    """A 4-bit checkpoint written by transformers and bitsandbytes themselves."""
    source = folder.with_name(folder.name + "-16bit")
    save_model(source, name, dtype)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return source


def assert_equals_oracle(model, oracle, dtype=torch.bfloat16):
    """Within twice the rounding noise that transformers' own run in that type has."""
    prompts = random_prompts()
    theirs = oracle_logits(oracle.to(dtype), prompts)
    exact = oracle_logits(oracle.float(), prompts)
    for actual, other, reference in zip(run_prompts(model, prompts), theirs, exact, strict=True):
        noise = (other - reference).abs().max().item()
        assert (actual - reference).abs().max().item() <= max(2 * noise, 1e-4)


def run_prompts(
    model: CausalLM, prompts: list[list[int]], block_size: int = 4
) -> list[torch.Tensor]:
    """Logits of whole prompts in one flat batch, through a paged cache with scattered blocks."""
    spec = model.spec
    num_blocks = [-(-len(prompt) // block_size) for prompt in prompts]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(0)).tolist()
    tables = torch.full((len(prompts), max(num_blocks)), -1, dtype=torch.int32)
    slots: list[int] = []
    for row, prompt in enumerate(prompts):
        blocks = [order.pop() for _ in range(num_blocks[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots += [blocks[i // block_size] * block_size + i % block_size for i in range(len(prompt))]
    lengths = [len(prompt) for prompt in prompts]
    batch = types.SimpleNamespace(
        input_ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_q=torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
    )
    shape = (sum(num_blocks), block_size, spec.num_kv_heads, spec.head_dim)
    caches = [
        (torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype))
        for _ in range(spec.num_layers)
    ]
    with torch.inference_mode():
        logits = model.logits(model.forward(batch, caches, None), None)  # type: ignore[arg-type]
    return list(logits.split(lengths))


def random_prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (17, 1, 9)]


def oracle_logits(model, prompts: list[list[int]]) -> list[torch.Tensor]:
    """transformers' logits, one prompt at a time."""
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def dense_oracle(folder: Path, dtype: torch.dtype):
    """The transformers model of a 4-bit folder, its weights dequantised by the plain formula into
    dense ones.
    """
    spec = ModelSpec.from_folder(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config._attn_implementation = "eager"
    model = getattr(transformers, spec.architecture)(config)
    state = {}
    with Checkpoint(folder) as checkpoint:
        for name, source in plan_tensors(checkpoint, spec).sources.items():
            if isinstance(source, StoredWeight):
                state[name] = dequantize_by_formula(checkpoint, source)
            else:
                state[name] = checkpoint.read(source)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.to(dtype).eval()


def dequantize_by_formula(checkpoint: Checkpoint, source: StoredWeight) -> torch.Tensor:
    """Element by element, from the stored tables: independent of kernels/nf4.py."""
    packed = checkpoint.read(source.packed_name).view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    absmax = checkpoint.read(source.parts["absmax"])
    if source.nested_offset is not None:
        table = checkpoint.read(source.parts["nested_quant_map"])
        nested = checkpoint.read(source.parts["nested_absmax"])
        index = torch.arange(len(absmax)) // 256
        absmax = table[absmax.long()] * nested[index] + source.nested_offset
    numel = source.shape[0] * source.shape[1]
    values = checkpoint.read(source.parts["quant_map"])[codes[:numel]]
    values = values * absmax[torch.arange(numel) // source.group_size]
    return values.view(source.shape).to(source.dtype)
