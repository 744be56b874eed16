"""From an adapter as read to the tensors that a step uses: DoRA's norms, biases, dtype, and one copy to the device.

All of it happens off the step, in the pool's loader thread, except the copy: tensors are packed into one buffer
(page-locked where there is a GPU), so that placing an adapter is a single transfer however many layers it touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import AdapterError
from engine.lora import EMBEDDING, SCORE_HEAD, LoraModule, LoraWeights, PlacedAdapter, PlacedModule
from kernels.nf4 import QuantizedWeight, dequantize_4bit

ALIGNMENT = 64  # bytes; vector loads of every kernel are happy with it
NORM_ROWS = 1024  # rows of a base weight held in float32 at once while DoRA's norms are computed


class BaseLayer(Protocol):
    """A layer of the base: what DoRA's norms and trained biases are relative to."""

    weight: QuantizedWeight | torch.Tensor | None
    bias: torch.Tensor | None


class BaseModel(Protocol):
    """What the pool needs of the model; engine/model.py's CausalLM."""

    embed_tokens: torch.Tensor

    def base_linear(self, path: str) -> BaseLayer: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset in the buffer."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter ready to be placed: one buffer in host memory, and where each tensor lies in it."""

    buffer: torch.Tensor
    """uint8 [num_bytes]."""
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel()

    @property
    def has_score_head(self) -> bool:
        return any(entry.path == SCORE_HEAD for entry in self.entries)

    def place(self, device: torch.device) -> PlacedAdapter:
        """Copy to the device; the tensors returned are views of that copy. On the CPU nothing is copied."""
        buffer = self.buffer.to(device, non_blocking=True)
        fields: dict[str, dict[str, torch.Tensor]] = {}
        for entry in self.entries:
            num_bytes = entry.dtype.itemsize * int(torch.Size(entry.shape).numel())
            tensor = (
                buffer[entry.start : entry.start + num_bytes].view(entry.dtype).view(entry.shape)
            )
            fields.setdefault(entry.path, {})[entry.field] = tensor
        return {path: PlacedModule(**tensors) for path, tensors in fields.items()}


def pack_adapter(
    weights: LoraWeights, model: BaseModel, dtype: torch.dtype, *, pin_memory: bool
) -> PackedAdapter:
    """Work out what each layer's tensors are on this base and pack them.

    Args:
        weights:    the adapter as read.
        model:      the base it goes with.
        dtype:      of the low-rank and dense matrices in the pool; gains and offsets stay float32.
        pin_memory: page-lock the buffer, for a fast copy to a GPU.

    Raises:
        AdapterError: a value overflows dtype, or a DoRA row has no direction.
    """
    tensors: list[tuple[str, str, torch.Tensor]] = []
    paths = {*weights.modules, *(parameter.rpartition(".")[0] for parameter in weights.replaced)}
    for path in sorted(paths):
        tensors += [(path, *item) for item in _placed_tensors(path, weights, model, dtype)]
    entries, size = [], 0
    for path, field, tensor in tensors:
        entries.append(_Entry(path, field, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pin_memory)
    for entry, (_, _, tensor) in zip(entries, tensors, strict=True):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[entry.start : entry.start + flat.numel()] = flat
    return PackedAdapter(buffer, tuple(entries))


def _placed_tensors(
    path: str, weights: LoraWeights, model: BaseModel, dtype: torch.dtype
) -> list[tuple[str, torch.Tensor]]:
    """The fields of one layer's PlacedModule, as (name, CPU tensor)."""
    module = weights.modules.get(path)
    dense = weights.replaced.get(f"{path}.weight")
    new_bias = weights.replaced.get(f"{path}.bias")
    if path == SCORE_HEAD:
        assert dense is not None
        return [("dense", dense.float())]
    base_bias = None if path == EMBEDDING else _host(model.base_linear(path).bias)
    fields: list[tuple[str, torch.Tensor]] = []
    if dense is not None:
        offset = new_bias.float() if new_bias is not None else base_bias
        fields.append(("dense", _cast(dense, dtype, f"{path}.weight")))
    elif module is not None and module.magnitude is not None:
        weight = model.embed_tokens if path == EMBEDDING else model.base_linear(path).weight
        assert weight is not None
        ratio = dora_ratio(module, weight, path)
        fields += _low_rank(path, module, dtype, ratio)
        fields.append(("gain", ratio - 1))
        # The base's output holds its bias b; DoRA scales what is left of it and the new bias b' comes unscaled:
        # ratio * (y - b) + b' = y + (ratio - 1) * y + (b' - ratio * b).
        offset = None if base_bias is None else -ratio * base_bias
        kept = new_bias.float() if new_bias is not None else base_bias
        if kept is not None:
            offset = kept if offset is None else offset + kept
    else:
        offset = None
        if module is not None:
            fields += _low_rank(path, module, dtype, None)
            offset = None if module.bias is None else module.bias.float()
        if new_bias is not None:
            change = new_bias.float() if base_bias is None else new_bias.float() - base_bias
            offset = change if offset is None else offset + change
    if offset is not None:
        fields.append(("offset", offset))
    return fields


def _low_rank(
    path: str, module: LoraModule, dtype: torch.dtype, ratio: torch.Tensor | None
) -> list[tuple[str, torch.Tensor]]:
    b = module.b.float() if ratio is None else module.b.float() * ratio[:, None]
    a = module.a.T if path == EMBEDDING else module.a
    return [
        ("a", _cast(a, dtype, f"{path} lora_A")),
        ("b", _cast(b, dtype, f"{path} lora_B times its scaling")),
    ]


def dora_ratio(
    module: LoraModule, weight: QuantizedWeight | torch.Tensor, path: str
) -> torch.Tensor:
    """float32 [out_features] on the CPU: magnitude / norm of each row of W + BA (arXiv:2402.09353, equation 5).

    For an embedding the rows are those of its transpose, as in peft.

    Raises:
        AdapterError: a row of W + BA is zero, so that it has no direction.
    """
    assert module.magnitude is not None
    base = dequantize_4bit(weight) if isinstance(weight, QuantizedWeight) else weight
    if path == EMBEDDING:
        base = base.T
    a, b = module.a.to(base.device, torch.float32), module.b.to(base.device, torch.float32)
    norms = [
        torch.linalg.vector_norm(
            torch.addmm(base[start : start + NORM_ROWS].float(), b[start : start + NORM_ROWS], a),
            dim=1,
        )
        for start in range(0, base.shape[0], NORM_ROWS)
    ]
    norm = torch.cat(norms).cpu()
    if not bool((norm > 0).all()):
        raise AdapterError(
            f"{path}: DoRA needs the norm of every row of W + BA, and some rows are zero on this base."
        )
    return module.magnitude.float() / norm


def _host(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().to("cpu", torch.float32)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    result = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        raise AdapterError(
            f"{name}: a value is too large for {dtype}; serve this adapter with --dtype bfloat16 or float32."
        )
    return result
