"""What a user can set about the engine; each field is one flag, its docstring the flag's help.

Frozen, keyword-only, checked at birth. A value discovered at run time (blocks that fit, the
model's length) is a return value, never written back here. Names follow vLLM's flags.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal


def require(condition: bool, field_name: str, expected: str, found: object) -> None:
    """Check one field of a config.

    Raises:
        ValueError: "field_name: expected X, got Y".
    """
    if not condition:
        raise ValueError(f"{field_name}: expected {expected}, got {found!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which base model, and how it is held in memory."""

    base: str = "demo"
    """Base model: a folder in Hugging Face format, a name in --model-dir, an alias such as
    llama-7b, or a Hugging Face repository id. The embedded demo when absent."""
    tokenizer: str | None = None
    """Folder of the tokenizer, when it is not the base model's."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of activations and of the weights that stay 16-bit; auto takes the checkpoint's."""
    quantization: Literal["auto", "nf4", "fp4", "none"] = "auto"
    """auto keeps a 4-bit checkpoint as it is and quantises a 16-bit one to NF4 with double
    quantisation; none serves 16-bit weights."""
    lm_head_dtype: Literal["auto", "int8", "nf4"] = "auto"
    """How the output head is held; auto keeps it as stored. int8 halves and nf4 quarters the memory
    that it takes and the time to read it, at some cost in accuracy. A head that is tied to the
    embedding gets a copy of its own."""
    cpu_activations: Literal["full", "int8"] = "full"
    """What the layers' 4-bit weights are multiplied with on a CPU: activations as they are, or
    rounded to 8 bits, 64 at a time with a scale of their own, which is faster and costs some
    accuracy. Wants a processor with AVX-512 VNNI and BF16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU when there is one."""
    threads: int | None = None
    """Threads on the CPU; by default as many as there are physical cores."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; by default what the model was trained for."""
    quantized_cache_dir: str | None = None
    """Where the 4-bit copy of a 16-bit checkpoint is kept; ~/.cache/herd/quantized by default."""

    def __post_init__(self) -> None:
        require(bool(self.base), "base", "a name or a path", self.base)
        require(
            self.threads is None or self.threads > 0, "threads", "a positive number", self.threads
        )
        require(
            self.max_model_len is None or self.max_model_len > 0,
            "max_model_len",
            "a positive number",
            self.max_model_len,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Paged KV-cache geometry. Sizes are in tokens unless the name says otherwise."""

    block_size: int = 16
    """Tokens per KV block; a power of two."""
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """Type of cached keys and values; auto is the model's dtype. fp8 (e4m3, with a scale for each
    token and head) holds twice as many tokens as 16 bits, at some cost in accuracy; on the CPU it
    saves memory, not time."""
    kv_cache_memory_bytes: int | None = None
    """Memory for the KV cache; by default what is free (see --gpu-memory-utilization), at most what
    --max-num-seqs full sequences need."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that weights, activations and cache may use together."""
    enable_prefix_caching: bool = True
    """Share the KV blocks of equal prompt beginnings between requests of the same adapter
    generation."""

    training_memory_bytes: int | None = None
    """Memory of a GPU that the KV cache leaves to training; `serve.py plan --train` says how much a
    run needs. By default none: training takes what --gpu-memory-utilization leaves."""

    def __post_init__(self) -> None:
        power_of_two = self.block_size > 0 and not self.block_size & (self.block_size - 1)
        require(power_of_two, "block_size", "a power of two", self.block_size)
        require(
            0.0 < self.gpu_memory_utilization <= 1.0,
            "gpu_memory_utilization",
            "0 < x <= 1",
            self.gpu_memory_utilization,
        )
        require(
            self.kv_cache_memory_bytes is None or self.kv_cache_memory_bytes > 0,
            "kv_cache_memory_bytes",
            "a positive number",
            self.kv_cache_memory_bytes,
        )
        require(
            self.training_memory_bytes is None or self.training_memory_bytes > 0,
            "training_memory_bytes",
            "a positive number",
            self.training_memory_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How many tokens to guess, and from what; see engine/speculation.py."""

    num_speculative_tokens: int
    """Drafts in one step of a sequence at most."""
    prompt_lookup_max: int
    """Tokens at the text's end that are searched for first."""
    prompt_lookup_min: int
    """The fewest that are searched for."""

    @classmethod
    def from_json(cls, text: str) -> SpeculativeConfig:
        """Read --speculative-config, in vLLM's spelling.

        Raises:
            ValueError: not JSON, another method, an unknown key or a value out of range.
        """
        name = "speculative_config"
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        require(isinstance(given, dict), name, "a JSON object", text)
        method = given.pop("method", "ngram")
        require(method == "ngram", f"{name}: method", '"ngram" (prompt lookup)', method)
        fields = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        unknown = sorted(given.keys() - set(fields))
        require(not unknown, name, f"the keys method, {', '.join(fields)}", ", ".join(unknown))
        # As in vLLM: of the two one alone means both, neither means 5.
        longest = given.get("prompt_lookup_max", given.get("prompt_lookup_min", 5))
        shortest = given.get("prompt_lookup_min", longest)
        values = (given.get("num_speculative_tokens"), longest, shortest)
        for key, value in zip(fields, values, strict=True):
            is_number = isinstance(value, int) and not isinstance(value, bool)
            require(is_number and value > 0, f"{name}: {key}", "a positive number", value)
        require(shortest <= longest, f"{name}: prompt_lookup_min", f"at most {longest}", shortest)
        return cls(**dict(zip(fields, values, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold."""

    max_num_seqs: int = 64
    """Sequences in one step at most."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step at most; decodes come first, prompt chunks share the rest."""
    train_max_stall_ms: float = 50.0
    """While an adapter is trained: how long training may hold up running streams, per token of
    theirs. Without streams it takes the whole machine."""
    speculative_config: str | None = None
    """Guess tokens that repeat earlier ones and check them in one step; texts stay the same. JSON
    as in vLLM: {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4,
    "prompt_lookup_min": 2}. Off when absent."""

    async_scheduling: Literal["auto", "on", "off"] = "auto"
    """Launch a step before the tokens of the one before it are read, so that the device need not
    wait for the host. Texts stay the same. auto: on a GPU. With --speculative-config steps wait all
    the same, because guesses begin with the last token; so they do beside training."""
    enforce_eager: bool = False
    """Launch every kernel of a step anew, instead of replaying decode steps as CUDA graphs."""

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Numbers of sequences for which a decode step is captured; others are filled up to the
        next. Kernels take tokens in eights, so that there fuller steps cost the same."""
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, self.max_num_seqs + 32, 32)]
        return tuple(sorted({min(size, self.max_num_seqs) for size in sizes}))

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """speculative_config, read."""
        if self.speculative_config is None:
            return None
        return SpeculativeConfig.from_json(self.speculative_config)

    def __post_init__(self) -> None:
        _ = self.speculation  # checks it
        require(self.max_num_seqs > 0, "max_num_seqs", "a positive number", self.max_num_seqs)
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"at least max_num_seqs ({self.max_num_seqs})",
            self.max_num_batched_tokens,
        )
        require(
            self.train_max_stall_ms > 0,
            "train_max_stall_ms",
            "a positive number",
            self.train_max_stall_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Room for adapters on the device."""

    max_loras: int = 8
    """Adapters on the device at once; more may be loaded, the least recently used give way."""
    max_lora_rank: int | None = None
    """Refuse adapters of a larger rank; by default any rank is served. On a GPU, room is kept for
    --max-loras adapters of this rank, 16 where it is not given; of larger ones fewer fit."""
    max_cpu_loras: int = 32
    """Adapters kept in host memory at most, so that a return to the device needs no disk."""

    def __post_init__(self) -> None:
        require(self.max_loras > 0, "max_loras", "a positive number", self.max_loras)
        require(
            self.max_lora_rank is None or self.max_lora_rank > 0,
            "max_lora_rank",
            "a positive number",
            self.max_lora_rank,
        )
        require(
            self.max_cpu_loras >= self.max_loras,
            "max_cpu_loras",
            f"at least max_loras ({self.max_loras})",
            self.max_cpu_loras,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that the engine worker is started with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
