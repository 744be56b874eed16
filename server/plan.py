"""serve.py plan: what serving and training a base model need, on GPUs that need not be here.

Only config.json is read; for the first LLaMA's four sizes not even that. Prints, flags are the
server's own, besides --gpu-memory and --train.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.resolve import BASE_ALIASES, DEMO, DEMO_BASE
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from engine.errors import CheckpointError
from engine.kv_cache import block_bytes, kv_cache_dtype
from engine.memory_plan import MemoryLine, serving_lines, training_lines
from engine.model_config import DTYPES, ModelSpec
from engine.train.config import TrainConfig
from server.flags import add_flags, from_args

GIB = 2**30
USUAL_GPUS = ("16GiB", "24GiB", "48GiB", "80GiB", "141GiB")
UNITS = {"": GIB, "G": GIB, "GIB": GIB, "GB": 10**9, "MIB": 2**20, "MB": 10**6}
SIZES = {  # of the first LLaMA: hidden, inner, layers, heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "30b": (6656, 17920, 60, 52),
    "65b": (8192, 22016, 80, 64),
}
SIZES["33b"] = SIZES["30b"]
DEFAULT_TRAINED_TOKENS = 512
TRAINING_SHARE = 0.95
"""Of a GPU that only trains; the rest is for the allocator's gaps."""


def plan(words: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 where some given GPU suffices, else 1.

    Raises:
        CheckpointError: there is no config.json, or it is of another kind of model.
        ValueError: a flag is out of range.
    """
    args = _parse(words)
    config = EngineConfig(
        model=from_args(ModelConfig, args),
        cache=from_args(CacheConfig, args),
        scheduler=from_args(SchedulerConfig, args),
        lora=from_args(LoraConfig, args),
    )
    spec = read_shapes(config.model.base, args.model_dir)
    training = from_args(TrainConfig, args) if args.train else None
    sizes = [parse_memory(text) for text in args.gpu_memory or USUAL_GPUS]
    text, fits = report(spec, config, training, sizes)
    sys.stdout.write(text)
    return 0 if fits else 1


def report(
    spec: ModelSpec, config: EngineConfig, training: TrainConfig | None, gpu_bytes: Sequence[int]
) -> tuple[str, bool]:
    """(what the command prints, whether everything asked for fits one of the GPUs)."""
    quantization = "nf4" if config.model.quantization == "auto" else config.model.quantization
    dtype = _dtype(spec, config.model.dtype)
    serving = serving_lines(spec, config, quantization=quantization, dtype=dtype)
    name = f"{config.model.base}: {spec.architecture}, {quantization}, {str(dtype)[6:]}"
    parts = [f"{name}\n\nServing\n", _table(serving)]
    verdicts = _serving_verdicts(spec, config, dtype, serving, gpu_bytes)
    fits = any(ok for _, ok in verdicts)
    parts += [text for text, _ in verdicts]
    if training is not None:
        num_tokens = training.micro_batch_tokens or training.max_seq_len or DEFAULT_TRAINED_TOKENS
        lines = training_lines(
            spec, training, num_tokens=num_tokens, dtype=dtype, is_4bit=quantization != "none"
        )
        alone = [*serving[:2], *lines]  # weights and context
        needed = total(alone)
        parts += [f"\nTraining alone, {num_tokens} tokens at a time\n", _table(alone)]
        parts += [
            f"  {_gib(size)}  {_fits(needed, int(TRAINING_SHARE * size))}\n" for size in gpu_bytes
        ]
        reserve = total(lines)
        beside = [*serving, MemoryLine("training", reserve, "as above, without the weights")]
        parts += [f"\nBoth at once: --training-memory-bytes {reserve}\n"]
        verdicts = _serving_verdicts(spec, config, dtype, beside, gpu_bytes)
        parts += [text for text, _ in verdicts]
        fits = any(needed <= TRAINING_SHARE * size for size in gpu_bytes)
    return "".join(parts), fits


def total(lines: Sequence[MemoryLine]) -> int:
    """Bytes of all lines together."""
    return sum(line.num_bytes for line in lines)


def read_shapes(base: str, model_dir: str | None) -> ModelSpec:
    """A model's shapes from config.json, or those of an alias such as llama-65b.

    Raises:
        CheckpointError: neither is there.
    """
    folders = [Path(base).expanduser(), *([Path(model_dir) / base] if model_dir else [])]
    if base == DEMO_BASE:
        folders = [DEMO / "model"]
    for folder in folders:
        if (folder / "config.json").is_file():
            return ModelSpec.from_folder(folder)
    size = base.lower().removeprefix("llama-")
    if size in SIZES and base.lower() in BASE_ALIASES:
        hidden, inner, layers, heads = SIZES[size]
        return ModelSpec.from_config(
            base,
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 32000,
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "max_position_embeddings": 2048,
                "torch_dtype": "float16",
            },
        )
    raise CheckpointError(
        f"{base}: there is no config.json in {' or '.join(str(f) for f in folders)}, and the name "
        f"is none of {', '.join(BASE_ALIASES)}. A plan loads nothing: download config.json alone "
        f"into a folder, and name the folder."
    )


def parse_memory(text: str) -> int:
    """ "24GiB", "16GB", "80" (GiB) -> bytes.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise ValueError(f"--gpu-memory: expected a size such as 24GiB or 16GB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.py plan",
        usage="serve.py plan --base BASE [--train] [--gpu-memory 24GiB ...] [flags]",
        description="What serving and training need, from config.json alone; nothing is loaded.",
    )
    parser.add_argument(
        "--gpu-memory", action="append", metavar="SIZE", help="of a GPU, 24GiB or 16GB; repeatable"
    )
    parser.add_argument("--train", action="store_true", help="plan the training of an adapter, too")
    parser.add_argument("--model-dir", help="folder in which names of base models are looked up")
    for config_class in (ModelConfig, CacheConfig, SchedulerConfig, LoraConfig, TrainConfig):
        add_flags(parser, config_class)
    return parser.parse_args(words)


def _dtype(spec: ModelSpec, asked: str) -> torch.dtype:
    if asked != "auto":
        return DTYPES[asked]
    return spec.dtype


def _serving_verdicts(
    spec: ModelSpec,
    config: EngineConfig,
    dtype: torch.dtype,
    lines: Sequence[MemoryLine],
    gpu_bytes: Sequence[int],
) -> list[tuple[str, bool]]:
    """A line for each GPU: what is left for the KV cache, and whether one sequence fits."""
    cache = config.cache
    per_block = block_bytes(spec, cache.block_size, kv_cache_dtype(cache, dtype))
    longest = config.model.max_model_len or spec.max_context_len
    most_tokens = config.scheduler.max_num_seqs * -(-longest // cache.block_size) * cache.block_size
    verdicts = []
    for size in gpu_bytes:
        allowed = int(size * cache.gpu_memory_utilization)
        num_tokens = max(0, allowed - total(lines)) // per_block * cache.block_size
        num_tokens = min(num_tokens, most_tokens)
        fits = num_tokens >= longest
        if fits:
            said = f"KV cache for {num_tokens:,} tokens, {num_tokens // longest} sequences"
        elif total(lines) > allowed:
            said = f"does not fit: {_gib(total(lines) - allowed).strip()} too much"
        else:
            said = f"KV cache for {num_tokens:,} tokens only: lower --max-model-len"
        verdicts.append((f"  {_gib(size)}  {said}\n", fits))
    return verdicts


def _fits(needed: int, allowed: int) -> str:
    spare = allowed - needed
    if spare >= 0:
        return f"fits, {_gib(spare).strip()} to spare"
    return f"does not fit: {_gib(-spare).strip()} too much"


def _table(lines: Sequence[MemoryLine]) -> str:
    rows = [*lines, MemoryLine("total", total(lines), "")]
    return "".join(
        f"  {line.name:<19} {line.num_bytes / 1e9:>8.2f} GB  {line.why}".rstrip() + "\n"
        for line in rows
    )


def _gib(count: int) -> str:
    return f"{count / GIB:>6.1f} GiB"
