"""What a base model needs of a device, part by part, from its shapes alone: nothing is loaded.

The start of the engine measures where it can (engine/startup.py) and asks here for the rest: what
adapters, graphs and training will take later has to be kept free before the KV cache takes all that
is left. `serve.py plan` asks for everything, for any size of device.

Counts   weights, cache, adapters, masters, gradients and optimizer are exact. Activations count
         the tensors that live at the worst moment of one layer, in the order of engine/layers.py
         and engine/train/; CONTEXT_BYTES is an assumption, said as such.
Public   MemoryLine, serving_lines, training_lines, adapter_bytes, lora_reserve, graph_reserve,
         activation_estimate, attention_workspace, scratch_bytes, layer_graph_bytes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, LoraConfig
from engine.memory import estimate_weights_bytes, format_bytes
from engine.model_config import ModelSpec
from engine.train.config import TrainConfig
from kernels.paged_attention import MAX_SPLIT_QUERIES, split_workspace_bytes

CONTEXT_BYTES = 600_000_000
"""Assumed: CUDA's context, the libraries' handles and the compiled kernels."""
ASSUMED_LORA_RANK = 16
"""Of adapters whose --max-lora-rank is not given."""
GRAPH_BYTES_PER_LAYER = 128 << 10
"""Assumed: what the driver keeps of one layer's launches in one captured graph."""
LOGIT_COPIES = 5
"""Of the float32 logits while they are sampled: as they are, a probability, a sorted copy and an
index of 8 bytes."""
MIN_LOGIT_ROWS = 256
"""Rows of logits at one time at least: prompt log-probabilities come in such pieces."""
MANY_TOKENS = 64
"""With more than these, projections are expanded to 16 bits: as kernels/gpu/device.py's plans."""
HEAD_CHUNK_BYTES = 32 << 20
"""Training: float32 logits of one chunk of rows."""
BLOCK_8BIT = 256
"""Elements of 8-bit optimizer state that share two float32 scales."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One part of what is needed."""

    name: str
    num_bytes: int
    why: str


def serving_lines(
    spec: ModelSpec, config: EngineConfig, *, quantization: str, dtype: torch.dtype
) -> list[MemoryLine]:
    """What serving needs besides the KV cache.

    Args:
        quantization: nf4, fp4 or none.
        dtype: of activations and of what is not 4-bit.
    """
    scheduler = config.scheduler
    num_tokens, num_seqs = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    lines = [_weights_line(spec, quantization, dtype), _context_line()]
    scratch = scratch_bytes(spec, dtype) if quantization != "none" else 0
    workspace = attention_workspace(spec, config, num_seqs, MAX_SPLIT_QUERIES)
    activations = activation_estimate(
        spec, dtype, num_tokens=num_tokens, num_seqs=num_seqs, workspace=workspace
    )
    lines.append(
        MemoryLine(
            "activations",
            activations + scratch,
            f"a step of {num_tokens} tokens, {max(num_seqs, MIN_LOGIT_ROWS)} rows of logits"
            + (f", one dequantised projection ({format_bytes(scratch)})" if scratch else ""),
        )
    )
    rank = config.lora.max_lora_rank or ASSUMED_LORA_RANK
    lines.append(
        MemoryLine(
            "adapters",
            lora_reserve(spec, config.lora, dtype),
            f"{config.lora.max_loras} of rank {rank} on all linear layers",
        )
    )
    if not config.scheduler.enforce_eager:
        num_graphs = len(scheduler.graph_sizes)
        lines.append(
            MemoryLine(
                "graphs", graph_reserve(spec, config, dtype), f"{num_graphs} captured decode steps"
            )
        )
    return lines


def training_lines(
    spec: ModelSpec, config: TrainConfig, *, num_tokens: int, dtype: torch.dtype, is_4bit: bool
) -> list[MemoryLine]:
    """What training one adapter needs besides the weights.

    Args:
        config: rank, target_modules, optimizer and paged count; paged None is paged.
        num_tokens: of one micro-batch.
        dtype: of the activations.
        is_4bit: the base's linear layers are expanded for large products.
    """
    size = dtype.itemsize
    targets = _trained(spec, config)
    shapes = spec.linear_shapes()
    num_parameters = config.rank * sum(sum(shapes[path]) for path in targets)
    per_layer = num_parameters / max(1, len({path.split(".")[2] for path in targets}))
    lines = [
        MemoryLine(
            "masters, gradients",
            8 * num_parameters,
            f"{num_parameters / 1e6:,.0f} M parameters of rank {config.rank}, float32 each",
        ),
        _optimizer_line(config, num_parameters, int(per_layer)),
        MemoryLine(
            "layer inputs",
            spec.num_layers * num_tokens * spec.hidden_size * size,
            f"{spec.num_layers} layers x {num_tokens} tokens x {spec.hidden_size}, kept for the "
            f"way back",
        ),
        MemoryLine(
            "one layer's graph",
            num_tokens * layer_graph_bytes(spec, size),
            "computed again on the way back, one layer at a time",
        ),
        MemoryLine(
            "gradients inside it",
            num_tokens * 4 * 9 * spec.intermediate_size,
            "SiLU's, in float32: nine tensors of the inner width",
        ),
        MemoryLine(
            "logits", 3 * HEAD_CHUNK_BYTES, "a chunk of rows: logits, their gradient, a copy"
        ),
    ]
    if is_4bit:
        lines.append(
            MemoryLine("dequantised", scratch_bytes(spec, dtype), "the largest projection, reused")
        )
    return lines


def adapter_bytes(spec: ModelSpec, rank: int, dtype: torch.dtype) -> int:
    """An adapter on all linear layers but the head, as it lies in a row of the pool."""
    shapes = spec.linear_shapes()
    return dtype.itemsize * rank * sum(sum(shapes[path]) for path in shapes if path != "lm_head")


def lora_reserve(spec: ModelSpec, config: LoraConfig, dtype: torch.dtype) -> int:
    """What all rows of the pool may take together."""
    rank = config.max_lora_rank or ASSUMED_LORA_RANK
    return config.max_loras * adapter_bytes(spec, rank, dtype)


def graph_reserve(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype) -> int:
    """What captured decode steps take: they share one pool, as large as the largest needs. Each
    recording of many rows expands projections into memory of its own."""
    sizes = config.scheduler.graph_sizes
    if config.scheduler.enforce_eager or not sizes:
        return 0
    most = max(sizes)
    workspace = attention_workspace(spec, config, most, 1)
    largest = activation_estimate(spec, dtype, num_tokens=most, num_seqs=most, workspace=workspace)
    if most > MANY_TOKENS:
        largest += scratch_bytes(spec, dtype)
    return largest + len(sizes) * spec.num_layers * GRAPH_BYTES_PER_LAYER


def activation_estimate(
    spec: ModelSpec, dtype: torch.dtype, *, num_tokens: int, num_seqs: int, workspace: int = 0
) -> int:
    """A step's tensors at its worst moment: in a layer's attention or MLP, and with the logits.

    Args:
        workspace: bytes that attention takes besides.
    """
    size = dtype.itemsize
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size = spec.num_heads * spec.head_dim
    qkv = q_size + 2 * spec.num_kv_heads * spec.head_dim
    in_mlp = 3 * hidden + 3 * inner  # residual, stream, norm; gate and up, their product
    in_attention = 3 * hidden + 2 * qkv + q_size  # ... q, k, v, the rotated ones, the result
    logits = LOGIT_COPIES * 4 * max(num_seqs, MIN_LOGIT_ROWS) * spec.vocab_size
    return max(num_tokens * size * in_mlp, num_tokens * size * in_attention + workspace) + logits


def attention_workspace(
    spec: ModelSpec, config: EngineConfig, num_seqs: int, num_queries: int
) -> int:
    """Bytes between attention's two launches, where tables reach to --max-model-len."""
    return split_workspace_bytes(
        num_seqs,
        num_queries,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        max_len=config.model.max_model_len or spec.max_context_len,
    )


def scratch_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """The largest fused projection in 16 bits: products with many tokens expand it first."""
    shapes = {name: math.prod(shape) for name, shape in spec.layer_linear_shapes().items()}
    fused = (
        sum(shapes[f"self_attn.{name}_proj"] for name in "qkv"),
        shapes["mlp.gate_proj"] + shapes["mlp.up_proj"],
        shapes["mlp.down_proj"],
    )
    return dtype.itemsize * max(fused)


def layer_graph_bytes(spec: ModelSpec, size: int) -> int:
    """What one layer's graph holds of each token, `size` bytes an element.

    Of attention: norm, dropout mask, q, k, v, the rotated q and k, the result twice and its mask,
    the stream behind it; scores are never written. Of the MLP: norm, mask, gate and up, their
    product and its mask, the stream behind it.
    """
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = 3 * spec.hidden_size + 5 * q_size + 3 * kv_size
    mlp = 3 * spec.hidden_size + 4 * spec.intermediate_size
    return size * (attention + mlp)


def _weights_line(spec: ModelSpec, quantization: str, dtype: torch.dtype) -> MemoryLine:
    shapes = spec.tensor_shapes()
    quantized = spec.quantizable_weights() if quantization != "none" else frozenset()
    in_4_bits = sum(math.prod(shapes[name]) for name in quantized)
    others = sum(math.prod(shape) for shape in shapes.values()) - in_4_bits
    why = f"{others / 1e9:.2f} B x {dtype.itemsize} bytes"
    if in_4_bits:
        why = f"{in_4_bits / 1e9:.2f} B x 0.516 bytes (4 bits, double quantisation), {why}"
    return MemoryLine("weights", estimate_weights_bytes(spec, quantization, dtype), why)


def _context_line() -> MemoryLine:
    return MemoryLine("context", CONTEXT_BYTES, "assumed for CUDA and its libraries")


def _trained(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """Paths of the layers that are trained; patterns are taken by their last parts."""
    paths = [path for path in spec.linear_shapes() if path != "lm_head"]
    if not config.target_modules:
        return paths
    return [path for path in paths if path.endswith(tuple(config.target_modules))]


def _optimizer_line(config: TrainConfig, num_parameters: int, per_layer: int) -> MemoryLine:
    is_8bit = config.optimizer == "adamw_8bit"
    bytes_each = 2 + 8 / BLOCK_8BIT if is_8bit else 8.0
    total = int(bytes_each * num_parameters)
    if config.paged is False:
        return MemoryLine(
            "optimizer", total, f"AdamW, {bytes_each:.3g} bytes per parameter on the device"
        )
    # One layer's state is updated while the next one's arrives and the last one's leaves.
    return MemoryLine(
        "optimizer",
        int(3 * bytes_each * per_layer),
        f"AdamW, {format_bytes(total)} in host memory; three layers' at a time here",
    )
