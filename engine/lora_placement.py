"""From an adapter as read to the tensors that a step uses: DoRA's norms, biases, dtype.

This is done off the step, in the loader thread. The tensors are packed into one buffer, page-locked
where there is a GPU, so that placing an adapter is a single copy however many layers it touches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.embedding import Table, whole_table
from engine.errors import AdapterError
from engine.head import Weight, dense_weight, is_copy_of
from engine.lora import EMBEDDING, SCORE_HEAD, LoraModule, LoraWeights, PlacedAdapter, PlacedModule
from engine.model_config import ModelSpec

ALIGNMENT = 64  # bytes; vector loads of every kernel are happy with it
MAGNITUDE_NOISE = 0.02  # relative; norms taken in bfloat16 differ by a few of its steps
NORM_ROWS = 1024  # rows of a base weight held in float32 at once while DoRA's norms are computed


class BaseLayer(Protocol):
    """A layer of the base: what DoRA's norms and trained biases are relative to."""

    weight: Weight | None
    bias: torch.Tensor | None


class BaseModel(Protocol):
    """What the pool needs of the model; engine/model.py's CausalLM."""

    spec: ModelSpec
    embed_tokens: Table

    def base_linear(self, path: str) -> BaseLayer: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset in the buffer."""
    is_transposed: bool = False
    """The buffer holds the matrix's transpose."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter ready to be placed: a buffer in host memory, and where each tensor lies in it."""

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
        """Copy to the device, in one piece; on the CPU nothing is copied."""
        buffer = self.buffer.to(device, non_blocking=True)
        fields: dict[str, dict[str, torch.Tensor]] = {}
        for entry in self.entries:
            num_bytes = entry.dtype.itemsize * int(torch.Size(entry.shape).numel())
            tensor = (
                buffer[entry.start : entry.start + num_bytes].view(entry.dtype).view(entry.shape)
            )
            fields.setdefault(entry.path, {})[entry.field] = (
                tensor.t() if entry.is_transposed else tensor
            )
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
        AdapterError: a value overflows dtype, a DoRA row has no direction, or nothing differs from
            the base.
    """
    replaced = {**weights.replaced, **_changed_copies(weights, model)}
    tensors: list[tuple[str, str, torch.Tensor]] = []
    paths = {*weights.modules, *(parameter.rpartition(".")[0] for parameter in replaced)}
    for path in sorted(paths):
        fields = _placed_tensors(path, weights.modules.get(path), replaced, model, dtype)
        tensors += [(path, *item) for item in fields]
    if not _has_effect(tensors):
        raise AdapterError(
            "this adapter changes nothing on this base: its biases and magnitudes are the base's "
            "own, and every lora_B is zero. Save it after training, or serve the base."
        )
    entries, size = [], 0
    stored = []
    for path, field, tensor in tensors:
        # A CPU reads b rank by rank (kernels/lora.py); a GPU, row by row.
        is_transposed = field == "b" and path != EMBEDDING and not pin_memory
        stored.append(tensor.t() if is_transposed else tensor)
        shape = tuple(stored[-1].shape)
        entries.append(_Entry(path, field, tensor.dtype, shape, size, is_transposed))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=pin_memory)
    for entry, tensor in zip(entries, stored, strict=True):
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        buffer[entry.start : entry.start + flat.numel()] = flat
    return PackedAdapter(buffer, tuple(entries))


def _has_effect(tensors: Sequence[tuple[str, str, torch.Tensor]]) -> bool:
    """Whether anything differs from the base; magnitudes must by more than 16-bit rounding."""
    for path, field, tensor in tensors:
        if field == ("a" if path == EMBEDDING else "b") and bool(tensor.any()):
            return True
        if field == "dense" or (field == "offset" and bool(tensor.any())):
            return True
        if field == "gain" and bool((tensor.abs() > MAGNITUDE_NOISE).any()):
            return True
    return False


def _changed_copies(weights: LoraWeights, model: BaseModel) -> dict[str, torch.Tensor]:
    """The stored copies of base matrices that differ from this base's; peft would load them."""
    changed = {}
    tied = {f"{EMBEDDING}.weight": "lm_head.weight", "lm_head.weight": f"{EMBEDDING}.weight"}
    for parameter, copy in weights.base_copies.items():
        if not is_copy_of(copy, _base_weight(parameter.removesuffix(".weight"), model)):
            changed[parameter] = copy
            if model.spec.tie_word_embeddings and tied[parameter] not in weights.replaced:
                changed.setdefault(tied[parameter], copy)
    return changed


def _placed_tensors(
    path: str,
    module: LoraModule | None,
    replaced: Mapping[str, torch.Tensor],
    model: BaseModel,
    dtype: torch.dtype,
) -> list[tuple[str, torch.Tensor]]:
    """The fields of one layer's PlacedModule, as (name, CPU tensor)."""
    dense = replaced.get(f"{path}.weight")
    if path == SCORE_HEAD:
        assert dense is not None
        return [("dense", dense.float())]
    new_bias = _host(replaced.get(f"{path}.bias"))
    base_bias = None if path == EMBEDDING else _host(model.base_linear(path).bias)
    bias = base_bias if new_bias is None else new_bias  # of the adapted layer
    fields: list[tuple[str, torch.Tensor]] = []
    ratio = None
    offset = None
    if dense is not None:
        if module is not None and module.magnitude is not None:
            raise AdapterError(
                f"{path}: DoRA on a weight that the adapter itself replaces is not supported."
            )
        fields.append(("dense", _cast(dense, dtype, f"{path}.weight")))
        offset = bias
    elif module is not None and module.magnitude is not None:
        ratio = dora_ratio(module, dense_weight(_base_weight(path, model)), path)
        fields.append(("gain", ratio - 1))
        # The base's output holds its bias b. DoRA scales the rest, and the adapted bias b' comes
        # unscaled: ratio * (y - b) + b' = y + (ratio - 1) * y + (b' - ratio * b).
        if bias is not None:
            offset = bias if base_bias is None else bias - ratio * base_bias
    elif new_bias is not None:
        offset = new_bias if base_bias is None else new_bias - base_bias
    if module is not None:
        fields += _low_rank(path, module, dtype, ratio)
        if module.bias is not None:
            offset = module.bias.float() if offset is None else offset + module.bias.float()
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


def dora_ratio(module: LoraModule, base: torch.Tensor, path: str) -> torch.Tensor:
    """float32 [out_features] on the CPU: magnitude / norm of each row of W + BA.

    arXiv:2402.09353, equation 5. For the embedding the rows are those of its transpose, as in peft.

    Raises:
        AdapterError: a row of W + BA is zero, so that it has no direction.
    """
    assert module.magnitude is not None
    if path == EMBEDDING:
        base = base.T
    a = module.a.to(base.device, torch.float32)
    b = module.b.to(base.device, torch.float32)
    norms = []
    for start in range(0, base.shape[0], NORM_ROWS):
        rows = slice(start, start + NORM_ROWS)
        adapted = torch.addmm(base[rows].float(), b[rows], a)
        norms.append(torch.linalg.vector_norm(adapted, dim=1))
    norm = torch.cat(norms).cpu()
    if not bool((norm > 0).all()):
        raise AdapterError(
            f"{path}: DoRA divides by the norm of each row of W + BA, and on this base some rows "
            f"are zero."
        )
    return module.magnitude.float() / norm


def _base_weight(path: str, model: BaseModel) -> Weight:
    if path == EMBEDDING:
        return whole_table(model.embed_tokens)
    weight = model.base_linear(path).weight
    assert weight is not None
    return weight


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor; twenty times as fast as isfinite."""
    smallest, largest = torch.aminmax(tensor)  # NaN if there is one
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())


def _host(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().to("cpu", torch.float32)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    result = tensor.to(dtype).contiguous()
    if not is_finite(result):
        raise AdapterError(
            f"{name}: a value is too large for {dtype}; serve this adapter with --dtype bfloat16 "
            f"or float32."
        )
    return result
