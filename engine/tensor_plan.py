"""Which tensor of a checkpoint fills which place of the model; every mismatch in one error.

Rules  A folder saved from the bare decoder lacks the prefix "model.": it is added when no name has
       it. rotary_emb.inv_freq, stored by early checkpoints, is ignored: frequencies follow from
       config.json. A tied head that is stored all the same is dropped when equal to the embedding;
       else it counts, as in transformers. A tied embedding stored only as lm_head.weight is taken
       from there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine.bnb_format import StoredWeight, group_parts, inspect_weight, part_of
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.model_config import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DENSE_CODES = ("F32", "F16", "BF16")
MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The model's tensors in reading order, each with its source in the checkpoint."""

    spec: ModelSpec
    """As given, but for a head that turned out not to be tied."""
    sources: dict[str, str | StoredWeight]
    """By the model's tensor name: a dense tensor's name in the checkpoint, or a 4-bit weight."""

    @property
    def quantized(self) -> dict[str, StoredWeight]:
        return {name: w for name, w in self.sources.items() if isinstance(w, StoredWeight)}

    def stored_bytes(self, checkpoint: Checkpoint, name: str) -> int:
        """Bytes on disk of one tensor, without its quant state."""
        source = self.sources[name]
        stored = source.packed_name if isinstance(source, StoredWeight) else source
        return checkpoint.tensors[stored].num_bytes


def plan_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> TensorPlan:
    """Match a checkpoint with a model.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshaped, or a quant state is broken;
            all are listed.
    """
    prefix = _prefix(checkpoint)
    names = {_canonical(name, prefix): name for name in checkpoint.tensors}
    spec = _resolve_tied_head(checkpoint, spec, names)
    groups = group_parts(names)
    shapes = spec.tensor_shapes()
    linear_weights = {f"{path}.weight" for path in spec.linear_shapes()}
    problems: list[str] = []
    sources: dict[str, str | StoredWeight] = {}
    for name, shape in shapes.items():
        if name in groups and name in linear_weights:
            parts = {part: [names[n] for n in found] for part, found in groups[name].items()}
            result = inspect_weight(checkpoint, names.get(name, name), shape, parts)
            if isinstance(result, StoredWeight):
                sources[name] = result
            else:
                problems += result
        elif name not in names:
            problems.append(f"tensor {name} {list(shape)} is missing: no file has it")
        else:
            problem = _dense_problem(checkpoint, names[name], shape)
            if problem:
                problems.append(problem)
            sources[name] = names[name]
    for canonical, name in names.items():
        owner = part_of(canonical)
        is_known = canonical in shapes or (owner is not None and owner[0] in linear_weights)
        if not is_known and not canonical.endswith("rotary_emb.inv_freq"):
            info = checkpoint.tensors[name]
            problems.append(f"{info.file.name}: tensor {name} {list(info.shape)} is unexpected")
    if problems:
        _raise(checkpoint, spec, problems)

    def position(source: str | StoredWeight) -> tuple[Path, int]:
        stored = source.packed_name if isinstance(source, StoredWeight) else source
        info = checkpoint.tensors[stored]
        return info.file, info.offset

    # In the order of the disk, so that the system reads ahead.
    ordered = dict(sorted(sources.items(), key=lambda item: position(item[1])))
    return TensorPlan(spec, ordered)


def _prefix(checkpoint: Checkpoint) -> str:
    has_prefix = any(name.startswith("model.") for name in checkpoint.tensors)
    return "" if has_prefix or "embed_tokens.weight" not in checkpoint.tensors else "model."


def _canonical(name: str, prefix: str) -> str:
    return name if name.startswith("lm_head.") else prefix + name


def _resolve_tied_head(checkpoint: Checkpoint, spec: ModelSpec, names: dict[str, str]) -> ModelSpec:
    """Settle what a stored head of a tied model means; `names` loses it where it is a duplicate."""
    if not spec.tie_word_embeddings or HEAD not in names:
        return spec
    if EMBEDDING not in names:
        names[EMBEDDING] = names.pop(HEAD)
        return spec
    if checkpoint.are_equal(names[EMBEDDING], names[HEAD]):
        del names[HEAD]
        return spec
    return dataclasses.replace(spec, tie_word_embeddings=False)


def _dense_problem(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> str | None:
    info = checkpoint.tensors[name]
    if info.shape == shape and info.dtype in DENSE_CODES:
        return None
    hint = ""
    if info.dtype in ("U8", "I8"):
        hint = " (packed codes without a quant_state tensor, or a format that is not supported)"
    return (
        f"{info.file.name}: tensor {name}: expected {list(shape)} of {', '.join(DENSE_CODES)}, "
        f"found {list(info.shape)} of {info.dtype}{hint}"
    )


def _raise(checkpoint: Checkpoint, spec: ModelSpec, problems: list[str]) -> None:
    shown = problems[:MAX_SHOWN]
    if len(problems) > MAX_SHOWN:
        shown.append(f"... and {len(problems) - MAX_SHOWN} more")
    listing = "\n  ".join(shown)
    raise CheckpointError(
        f"{checkpoint.folder}: the weights do not fit the {spec.architecture} that config.json "
        f"describes:\n  {listing}\n"
        f"Download config.json and the weight files again, all from the same revision."
    )
