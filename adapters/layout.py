"""What each tensor of a PEFT file is, and whether together they fit the configuration and the base model.

Keys     base_model.model.<module path>.lora_A.weight [r, in], .lora_B.weight [out, r], .lora_B.bias [out],
         .lora_magnitude_vector [out]; for the embedding .lora_embedding_A [r, vocab], .lora_embedding_B [hidden, r]
Replaced <module path>.weight and .bias of modules_to_save; <module path>.base_layer.bias of bias="lora_only"
Copies   the embedding's and the head's own matrices, which peft stores whenever they are adapted
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.peft_config import SCORE_HEAD_NAMES, PeftConfig
from engine.lora import EMBEDDING, SCORE_HEAD

if TYPE_CHECKING:
    from engine.model_config import ModelSpec

PREFIX = "base_model.model."
FINGERPRINT_KEY = "herd_base_fingerprint"
"""In the safetensors metadata: the base that an adapter was trained on."""
DTYPES = ("F32", "F16", "BF16")
PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
}
PART_NAMES = {
    "a": "lora_A",
    "b": "lora_B",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as the file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling: F32, BF16 ..."""


@dataclass(slots=True)
class ModuleKeys:
    """The keys of one module's tensors."""

    a: str | None = None
    b: str | None = None
    bias: str | None = None
    magnitude: str | None = None


@dataclass(slots=True)
class Layout:
    """Every tensor of the file, by what it is."""

    modules: dict[str, ModuleKeys] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    """Key by parameter path."""
    base_copies: dict[str, str] = field(default_factory=dict)
    fingerprint: str | None = None

    def target_names(self) -> tuple[str, ...]:
        paths = [*self.modules, *(parameter.rpartition(".")[0] for parameter in self.replaced)]
        return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def read_layout(
    config: PeftConfig,
    tensors: Mapping[str, TensorHeader],
    fingerprint: str | None,
    spec: ModelSpec,
    problems: list[str],
) -> Layout:
    """Sort the tensors and append everything that does not fit to problems."""
    shapes = {**spec.linear_shapes(), EMBEDDING: spec.embedding_shape}
    if config.task_type == "SEQ_CLS":
        shapes[SCORE_HEAD] = (1, spec.hidden_size)
    layout = Layout(fingerprint=fingerprint)
    unexpected = _sort_tensors(config, tensors, shapes, layout)
    # A model with a score head has no other.
    known = shapes.keys() - ({SCORE_HEAD, "lm_head"} if config.task_type == "SEQ_CLS" else set())
    if not layout.modules and not layout.replaced:
        problems.append(
            f"no module of the adapter matches this base: it has {_some(tensors) or 'no tensors'}, the base has "
            f"{_some(known)}. It was made for another architecture"
        )
        return layout
    if unexpected:
        problems.append(f"tensors that mean nothing to this base: {_some(unexpected)}")
    for key, header in tensors.items():
        if header.dtype not in DTYPES:
            problems.append(f"{key}: dtype {header.dtype}, expected one of {', '.join(DTYPES)}")
    _check_targets(config, layout, known, spec, problems)
    for path in sorted(layout.modules):
        _check_module(config, path, layout.modules[path], tensors, shapes[path], spec, problems)
    _check_whole_tensors(layout, tensors, shapes, spec, problems)
    _check_saved_modules(config, layout, shapes, problems)
    return layout


def _sort_tensors(
    config: PeftConfig,
    tensors: Mapping[str, TensorHeader],
    shapes: Mapping[str, object],
    layout: Layout,
) -> list[str]:
    """Fill the layout; returns the keys of tensors that belong to nothing."""
    unexpected = []
    for key in tensors:
        if not key.startswith(PREFIX):
            unexpected.append(key)
            continue
        name = key.removeprefix(PREFIX)
        path, part = _split(name)
        if path not in shapes:
            unexpected.append(key)
        elif part in PARTS:
            setattr(layout.modules.setdefault(path, ModuleKeys()), PARTS[part], key)
        elif part == "base_layer.bias":
            layout.replaced[f"{path}.bias"] = key
        elif part == "base_layer.weight" and path in (EMBEDDING, "lm_head"):
            layout.base_copies[f"{path}.weight"] = key
        elif part == "weight" and (config.saves(path) or path == SCORE_HEAD):
            layout.replaced[f"{path}.weight"] = key
        elif part == "weight" and path in (EMBEDDING, "lm_head"):
            layout.base_copies[f"{path}.weight"] = key
        elif part == "bias":
            layout.replaced[f"{path}.bias"] = key
        else:
            unexpected.append(key)
    return unexpected


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as (module path, part)."""
    for part in (*PARTS, "base_layer.weight", "base_layer.bias"):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    path, _, part = name.rpartition(".")
    return path, part


def _check_targets(
    config: PeftConfig, layout: Layout, known: set[str], spec: ModelSpec, problems: list[str]
) -> None:
    """The modules that the file adapts must be those that the configuration names."""
    if config.target_modules is None:
        return
    targeted = {path for path in known if config.targets(path)}
    found = set(layout.modules)
    tied = (
        {EMBEDDING, "lm_head"} if config.ensure_weight_tying and spec.tie_word_embeddings else set()
    )
    if not targeted and not tied:
        problems.append(
            f"target_modules matches no module of this base: found {_target_text(config)}, the base has {_some(known)}"
        )
    if targeted - found:
        problems.append(
            f"target_modules names modules without tensors in the file: {_some(targeted - found)}"
        )
    if found - targeted - tied:
        problems.append(
            f"tensors of modules that target_modules does not name: {_some(found - targeted - tied)}"
        )


def _check_module(
    config: PeftConfig,
    path: str,
    keys: ModuleKeys,
    tensors: Mapping[str, TensorHeader],
    shape: tuple[int, int],
    spec: ModelSpec,
    problems: list[str],
) -> None:
    """One module's tensors against the configuration's rank and the base's shape."""
    rank = config.rank(path)
    out_features, in_features = shape if path != EMBEDDING else (shape[1], shape[0])
    expected = {
        "a": (rank, in_features),
        "b": (out_features, rank),
        "bias": (out_features,),
        "magnitude": (out_features,),
    }
    for part, other in (("a", "b"), ("b", "a")):
        if getattr(keys, part) is None:
            problems.append(f"{path}: {PART_NAMES[other]} has no {PART_NAMES[part]} beside it")
    if config.use_dora and keys.magnitude is None:
        problems.append(f"{path}: use_dora is set and lora_magnitude_vector is missing")
    if not config.use_dora and keys.magnitude is not None:
        problems.append(f"{path}: lora_magnitude_vector is there and use_dora is not set")
    for part, expected_shape in expected.items():
        key = getattr(keys, part)
        if key is None or tensors[key].shape == expected_shape:
            continue
        found = tensors[key].shape
        hint = ""
        if (
            part in ("a", "b")
            and len(found) == 2
            and _fits_another_rank(part, found, expected_shape)
        ):
            hint = f"; adapter_config.json says rank {rank} for it"
        elif path in (EMBEDDING, "lm_head"):
            hint = _vocabulary_hint(spec)
        problems.append(
            f"{key.removeprefix(PREFIX)}: shape {_text(found)}, expected {_text(expected_shape)}{hint}"
        )


def _fits_another_rank(part: str, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return found[1] == expected[1] if part == "a" else found[0] == expected[0]


def _check_whole_tensors(
    layout: Layout,
    tensors: Mapping[str, TensorHeader],
    shapes: Mapping[str, tuple[int, int]],
    spec: ModelSpec,
    problems: list[str],
) -> None:
    """Replaced and copied tensors have the shape of the base's."""
    for parameter, key in [*layout.replaced.items(), *layout.base_copies.items()]:
        path, _, kind = parameter.rpartition(".")
        expected = shapes[path] if kind == "weight" else (shapes[path][0],)
        found = tensors[key].shape
        if found != expected:
            hint = _vocabulary_hint(spec) if path in (EMBEDDING, "lm_head") else ""
            if path == SCORE_HEAD:
                hint = (
                    "; score heads have one output, a classifier with several labels is not served"
                )
            problems.append(
                f"{key.removeprefix(PREFIX)}: shape {_text(found)}, expected {_text(expected)}{hint}"
            )
        has_no_bias = path in (EMBEDDING, SCORE_HEAD) or not spec.has_bias(path)
        if kind == "bias" and has_no_bias:
            problems.append(f"{key.removeprefix(PREFIX)}: this base has no bias there")


def _check_saved_modules(
    config: PeftConfig, layout: Layout, shapes: Mapping[str, tuple[int, int]], problems: list[str]
) -> None:
    """What modules_to_save names must be modules we can replace, and must be in the file."""
    for name in config.modules_to_save:
        paths = [path for path in shapes if path.endswith(name)]
        missing = [path for path in paths if f"{path}.weight" not in layout.replaced]
        if missing:
            problems.append(
                f"modules_to_save names modules without tensors in the file: {_some(missing)}"
            )
        if not paths and name not in SCORE_HEAD_NAMES:
            problems.append(
                f"modules_to_save: {name!r} is not a module that can be replaced; linear layers, lm_head, embed_tokens and "
                f"score can"
            )
    if config.task_type == "SEQ_CLS" and "score.weight" not in layout.replaced:
        problems.append("task_type is SEQ_CLS and score.weight, the score head, is missing")
    if config.task_type != "SEQ_CLS" and "score" in config.modules_to_save:
        problems.append("modules_to_save has a score head; that needs task_type SEQ_CLS")


def _vocabulary_hint(spec: ModelSpec) -> str:
    return (
        f"; the base's vocabulary has {spec.vocab_size} tokens. An adapter that resized it needs its own base: merge it "
        f"with peft and serve the result"
    )


def _target_text(config: PeftConfig) -> str:
    targets = config.target_modules
    return repr(targets) if isinstance(targets, str) else _some(targets or ())


def _some(names: object) -> str:
    """Up to four of the names, sorted."""
    ordered = sorted(names)  # type: ignore[call-overload]
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
