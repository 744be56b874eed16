"""bitsandbytes' 4-bit weights inside a checkpoint: one weight read, checked or written.

A weight W of path P is stored as P.weight (packed codes, uint8 or viewed as another type) and,
below that name, absmax, quant_map and quant_state.bitsandbytes__nf4 (or __fp4: UTF-8 JSON in
bytes), with double quantisation also nested_absmax and nested_quant_map. Files differ in nothing
from what bitsandbytes 0.50 and transformers 5 write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.json_fields import Fields
from engine.memory import quantized_bytes
from engine.model_config import DTYPES
from kernels.codebooks import DYNAMIC_MAP, QuantType, codebook
from kernels.nf4 import GROUP_SIZES, NESTED_BLOCK, QuantizedWeight

PART_NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE_PREFIX = "bitsandbytes__"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A quantised weight of a checkpoint, checked, not yet read."""

    packed_name: str
    parts: dict[str, str]
    """Tensor names by part: absmax, nested_absmax ..."""
    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: QuantType
    group_size: int
    nested_offset: float | None

    @property
    def num_bytes(self) -> int:
        """Memory that it will take."""
        return quantized_bytes(
            math.prod(self.shape),
            double_quant=self.nested_offset is not None,
            group_size=self.group_size,
        )

    def read(self, checkpoint: Checkpoint) -> QuantizedWeight:
        """Bring it into memory, still packed.

        Raises:
            CheckpointError: it cannot be read, or its scales are no finite numbers.
        """
        packed = checkpoint.read(self.packed_name).reshape(-1).view(torch.uint8)
        absmax = checkpoint.read(self.parts["absmax"]).reshape(-1)
        nested_absmax = nested_offset = None
        if self.nested_offset is not None:
            nested_absmax = checkpoint.read(self.parts["nested_absmax"]).reshape(-1)
            nested_offset = torch.tensor(self.nested_offset, dtype=torch.float32)
        scales = absmax if nested_absmax is None else nested_absmax
        if not scales.isfinite().all():
            info = checkpoint.tensors[self.packed_name]
            raise CheckpointError(
                f"{info.file}: tensor {self.packed_name}: its scales hold NaN or infinity. "
                f"The checkpoint is damaged; download it again."
            )
        return QuantizedWeight(
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
            shape=self.shape,
            dtype=self.dtype,
            quant_type=self.quant_type,
            group_size=self.group_size,
        )


def part_of(name: str) -> tuple[str, str] | None:
    """("P.weight", part) when a tensor name is part of a quantised weight's state, else None.

    Early files write P.weight.quant_state.absmax for P.weight.absmax; both are read.
    """
    owner, dot, rest = name.rpartition(".weight.")
    last = rest.rpartition(".")[2]
    if not dot or not (last in PART_NAMES or last.startswith(STATE_PREFIX)):
        return None
    return f"{owner}.weight", last


def group_parts(names: Mapping[str, object]) -> dict[str, dict[str, list[str]]]:
    """Quantised weights by name: part -> tensor names, of which there should be one."""
    groups: dict[str, dict[str, list[str]]] = {}
    for name in names:
        found = part_of(name)
        if found is not None:
            owner, part = found
            key = "quant_state" if part.startswith(STATE_PREFIX) else part
            groups.setdefault(owner, {}).setdefault(key, []).append(name)
    return groups


def inspect_weight(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], parts: Mapping[str, list[str]]
) -> StoredWeight | list[str]:
    """Check one quantised weight: its state, maps and sizes. Reads a few hundred bytes.

    Args:
        checkpoint: where it lies.
        name: tensor name of the packed codes in the checkpoint.
        shape: what the model needs.
        parts: from group_parts.

    Returns:
        The weight, or every problem found, each naming file and tensor.
    """
    if name not in checkpoint.tensors:
        other = next(iter(parts.values()))[0]
        file = checkpoint.tensors[other].file.name
        return [f"{file}: tensor {name} is missing, though {other} is there"]
    info = checkpoint.tensors[name]
    for part in ("quant_state", *PART_NAMES):
        found = sorted(parts.get(part, []))
        if len(found) > 1 or (part == "quant_state" and not found):
            shown = ", ".join(found) or "none"
            return [f"{info.file.name}: tensor {name}: expected exactly one {part}, found {shown}"]
    first = {part: found[0] for part, found in parts.items()}
    state_name = first["quant_state"]
    state = _read_state(checkpoint, state_name)
    if isinstance(state, str):
        return [state]
    problems: list[str] = []
    fields = Fields(checkpoint.tensors[state_name].file, state, f"tensor {state_name}: ", problems)
    quant_type: Any = state.get("quant_type")
    if quant_type not in ("nf4", "fp4") or not state_name.endswith(STATE_PREFIX + str(quant_type)):
        fields.problem("quant_type", "nf4 or fp4, as in the tensor's name")
    group_size: Any = state.get("blocksize")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        fields.problem("blocksize", f"one of {', '.join(map(str, GROUP_SIZES))}")
    if str(state.get("dtype")) not in DTYPES:
        fields.problem("dtype", f"one of {', '.join(DTYPES)}")
    if state.get("shape") != list(shape):
        fields.problem("shape", f"{list(shape)} as config.json implies")
    is_nested = "nested_absmax" in first or "nested_offset" in state
    offset = None
    if is_nested:
        offset = fields.number("nested_offset")
        for key, value in (("nested_blocksize", NESTED_BLOCK), ("nested_dtype", "float32")):
            if state.get(key) != value:
                fields.problem(key, str(value))
    if problems:
        return [f"{info.file.name}: {problem}" for problem in problems]
    sizes = _expected_parts(math.prod(shape), group_size, is_nested)
    problems += _check_parts(checkpoint, name, first, sizes)
    if not problems:
        problems += _check_maps(checkpoint, first, quant_type, is_nested)
    if problems:
        return problems
    return StoredWeight(
        packed_name=name,
        parts=first,
        shape=(shape[0], shape[1]),
        dtype=DTYPES[state["dtype"]],
        quant_type=quant_type,
        group_size=group_size,
        nested_offset=offset,
    )


def _read_state(checkpoint: Checkpoint, name: str) -> dict[str, Any] | str:
    info = checkpoint.tensors[name]
    expected = f"{info.file.name}: tensor {name}: expected a small JSON object in bytes"
    if info.dtype != "U8" or info.num_bytes > 65536:
        return f"{expected}, found {info.dtype} {list(info.shape)}"
    try:
        state = json.loads(checkpoint.read(name).numpy().tobytes())
    except ValueError as error:
        return f"{expected}: {error}"
    return state if isinstance(state, dict) else f"{expected}, found {state!r:.60}"


def _expected_parts(numel: int, group_size: int, is_nested: bool) -> dict[str, tuple[str, int]]:
    """Type and number of elements of each part."""
    num_groups = math.ceil(numel / group_size)
    parts = {"absmax": ("U8" if is_nested else "F32", num_groups), "quant_map": ("F32", 16)}
    if is_nested:
        parts["nested_absmax"] = ("F32", math.ceil(num_groups / NESTED_BLOCK))
        parts["nested_quant_map"] = ("F32", 256)
    parts["packed"] = ("", math.ceil(numel / 2))
    return parts


def _check_parts(
    checkpoint: Checkpoint,
    name: str,
    parts: Mapping[str, str],
    sizes: Mapping[str, tuple[str, int]],
) -> list[str]:
    problems = []
    for part, (dtype, count) in sizes.items():
        tensor_name = name if part == "packed" else parts.get(part)
        if tensor_name is None:
            problems.append(
                f"{checkpoint.tensors[name].file.name}: tensor {name}.{part} is missing"
            )
            continue
        info = checkpoint.tensors[tensor_name]
        found = f"{info.file.name}: tensor {tensor_name}: expected"
        if part == "packed":
            # The codes may be stored as any type; only the bytes count.
            if info.num_bytes != count:
                problems.append(f"{found} {count} bytes of packed codes, found {info.num_bytes}")
        elif info.dtype != dtype or math.prod(info.shape) != count:
            problems.append(f"{found} {dtype} [{count}], found {info.dtype} {list(info.shape)}")
    return problems


def _check_maps(
    checkpoint: Checkpoint, parts: Mapping[str, str], quant_type: QuantType, is_nested: bool
) -> list[str]:
    """The stored tables must be the standard ones: the kernels have these built in."""
    standard = {"quant_map": codebook(quant_type)}
    if is_nested:
        standard["nested_quant_map"] = DYNAMIC_MAP
    problems = []
    for part, expected in standard.items():
        found = checkpoint.read(parts[part]).reshape(-1)
        # Tables computed by other versions differ in the last bit.
        if not torch.allclose(found, expected.cpu(), rtol=1e-5, atol=1e-8):
            info = checkpoint.tensors[parts[part]]
            where = f"{info.file.name}: tensor {parts[part]}"
            problems.append(f"{where}: expected the standard table of {quant_type}, found another")
    return problems


def weight_tensors(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """A quantised weight as bitsandbytes stores it, on the CPU: tensor name -> tensor."""
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.group_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.packed.cpu().reshape(-1, 1),
        f"{name}.absmax": weight.absmax.cpu(),
        f"{name}.quant_map": codebook(weight.quant_type).cpu(),
    }
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax.cpu()
        tensors[f"{name}.nested_quant_map"] = DYNAMIC_MAP.cpu()
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.nested_offset.item()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}.quant_state.{STATE_PREFIX}{weight.quant_type}"] = text
    return tensors
