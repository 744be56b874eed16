"""What a model is: architecture, sizes and flags, read from a Hugging Face folder's config.json.

Four architectures differ only in flags here: Llama 1/2/3, Mistral, Qwen2, Qwen3. Neither remote
code nor a model hub is involved. Both spellings are read: rope_theta + rope_scaling + torch_dtype
(published checkpoints) and rope_parameters + dtype (written by transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.json_fields import Fields, read_json_object
from engine.rope import RopeSpec, read_rope

ARCHITECTURE_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED_ARCHITECTURES = tuple(ARCHITECTURE_BY_MODEL_TYPE.values())
MAX_LAYERS = 1000
"""More is a broken file, not a model."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes and flags of one decoder-only model, checked against each other."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Not always hidden_size / num_heads."""
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on q, k and v."""
    attention_out_bias: bool
    mlp_bias: bool
    has_qk_norm: bool
    """RMSNorm over each head of q and k, before the rotary embedding (Qwen3)."""
    sliding_windows: tuple[int | None, ...]
    """One per layer: query i sees key j when i - j < window; None sees all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: torch.dtype
    """The checkpoint's, float32 when config.json names none; in a loaded model what it runs in."""

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelSpec:
        """Read config.json, and generation_config.json for the end-of-text tokens.

        Raises:
            CheckpointError: a file is missing or broken, the architecture or an option of it is
                not supported, or numbers are absent or contradict each other; every such field is
                named.
        """
        folder = Path(path)
        config_path = folder / "config.json"
        config = read_json_object(config_path)
        architecture = _architecture(config_path, config)
        generation: dict[str, Any] = {}
        if (folder / "generation_config.json").exists():
            generation = read_json_object(folder / "generation_config.json")
        return _read_spec(Fields(config_path, config), architecture, generation)

    @classmethod
    def from_config(cls, name: str, config: dict[str, Any]) -> ModelSpec:
        """The same from the content of a config.json that is in no folder; `name` is for errors.

        Raises:
            CheckpointError: as from_folder.
        """
        path = Path(name)
        return _read_spec(Fields(path, config), _architecture(path, config), {})

    @property
    def max_context_len(self) -> int:
        """Tokens the model was made for; linear scaling stretches the positions by its factor."""
        stretch = self.rope.factor if self.rope.kind == "linear" else 1.0
        return int(self.max_position_embeddings * stretch)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        return (self.vocab_size, self.hidden_size)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer an adapter may target, by module path: (out_features, in_features)."""
        shapes = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.num_layers)
            for name, shape in self.layer_linear_shapes().items()
        }
        shapes["lm_head"] = self.embedding_shape
        return shapes

    def layer_linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, by path below it: (out_features, in_features)."""
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q_size),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    def quantizable_weights(self) -> frozenset[str]:
        """Names of the tensors that quantising makes 4-bit: all linear weights but the head."""
        return frozenset(f"{path}.weight" for path in self.linear_shapes() if path != "lm_head")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, by its name in a checkpoint; a tied head is not among them."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": self.embedding_shape}
        for path, shape in self.linear_shapes().items():
            if path != "lm_head" or not self.tie_word_embeddings:
                shapes[f"{path}.weight"] = shape
            if self.has_bias(path):
                shapes[f"{path}.bias"] = shape[:1]
        for index in range(self.num_layers):
            prefix = f"model.layers.{index}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.has_qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        return shapes

    def has_bias(self, path: str) -> bool:
        """Whether the linear layer of that module path has a bias."""
        name = path.rpartition(".")[2]
        if name in ("q_proj", "k_proj", "v_proj"):
            return self.attention_bias
        if name == "o_proj":
            return self.attention_out_bias
        return self.mlp_bias and name in ("gate_proj", "up_proj", "down_proj")


def declared_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The type that config.json names, in either spelling; None when it names none we know."""
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def _architecture(path: Path, config: dict[str, Any]) -> str:
    """The one supported architecture a config names.

    Raises:
        CheckpointError: it names another, several or none.
    """
    found = config.get("architectures")
    if found is None or found == ["LLaMAForCausalLM"]:
        # Some files name only the model type; the first conversions of Llama 1 spell it otherwise.
        found = [ARCHITECTURE_BY_MODEL_TYPE.get(str(config.get("model_type")), "none")]
    if isinstance(found, list) and len(found) == 1 and found[0] in SUPPORTED_ARCHITECTURES:
        return str(found[0])
    shown = ", ".join(map(str, found)) if isinstance(found, list) else repr(found)
    shown = f"{shown or 'none'} (model_type {config.get('model_type')})"
    raise CheckpointError(
        f"{path}: architectures: found {shown}; supported are "
        f"{', '.join(SUPPORTED_ARCHITECTURES)}. Choose a base model of one of these."
    )


def _read_spec(config: Fields, architecture: str, generation: dict[str, Any]) -> ModelSpec:
    is_qwen2, is_qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    is_llama = architecture == "LlamaForCausalLM"
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    num_heads = config.integer("num_attention_heads")
    # An absent field means the default of transformers' config class; null means as many as heads.
    absent_kv_heads = {"LlamaForCausalLM": num_heads, "MistralForCausalLM": 8}.get(architecture, 32)
    num_kv_heads = config.integer(
        "num_key_value_heads",
        default=num_heads if "num_key_value_heads" in config else absent_kv_heads,
    )
    head_dim = config.integer(
        "head_dim", default=128 if is_qwen3 else max(1, hidden_size // num_heads)
    )
    absent_positions = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072}
    max_position_embeddings = config.integer(
        "max_position_embeddings", default=absent_positions.get(architecture, 32768)
    )
    if config.get("head_dim") is None and not is_qwen3 and hidden_size % num_heads:
        config.problem(
            "hidden_size",
            f"a multiple of num_attention_heads ({num_heads}), as there is no head_dim",
        )
    if num_heads % num_kv_heads:
        config.problem("num_attention_heads", f"a multiple of num_key_value_heads ({num_kv_heads})")
    if head_dim % 2:
        config.problem(
            "head_dim", "an even number, as rotary embeddings turn pairs", found=head_dim
        )
    activation = config.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        config.problem("hidden_act", "silu")
    dtype_field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype_name = config.text(dtype_field, default="float32").removeprefix("torch.")
    if dtype_name not in DTYPES:
        config.problem(dtype_field, f"one of {', '.join(DTYPES)}")
    eos_source = Fields(config.path.with_name("generation_config.json"), generation)
    eos_token_ids = eos_source.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    bos_token_ids = config.token_ids("bos_token_id") or eos_source.token_ids("bos_token_id")
    has_bias_field = is_llama or is_qwen3
    attention_bias = has_bias_field and config.boolean("attention_bias", default=False)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6, above=0.0),
        rope=read_rope(config, max_position_embeddings),
        tie_word_embeddings=config.boolean("tie_word_embeddings", default=False),
        attention_bias=attention_bias or is_qwen2,
        attention_out_bias=attention_bias,
        mlp_bias=is_llama and config.boolean("mlp_bias", default=False),
        has_qk_norm=is_qwen3,
        sliding_windows=_sliding_windows(config, architecture, num_layers),
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        dtype=DTYPES.get(dtype_name, torch.float32),
    )
    config.raise_problems()
    eos_source.raise_problems()
    return spec


def _sliding_windows(config: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window. Llama: none; Mistral: all or none; Qwen: as layer_types or
    max_window_layers says.
    """
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        # Absent means 4096 in transformers; null, which later checkpoints have, means none.
        absent = 4096 if "sliding_window" not in config else None
        window = config.integer("sliding_window", default=absent)
        return (window,) * num_layers
    window = config.integer(
        "sliding_window", default=4096 if "sliding_window" not in config else None
    )
    if not config.boolean("use_sliding_window", default=False):
        window = None
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.integer("max_window_layers", default=28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    is_list = isinstance(layer_types, list) and len(layer_types) == num_layers
    if not is_list or not all(isinstance(name, str) and name in known for name in layer_types):
        config.problem(
            "layer_types", f"a list of {num_layers} names, full_attention or sliding_attention"
        )
        return (None,) * num_layers
    return tuple(known[name] for name in layer_types)
