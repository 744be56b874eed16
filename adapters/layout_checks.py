"""Whether the tensors of a PEFT file fit together, its configuration and the base model.

peft warns about most of this and goes on. Every problem is named with what was found and what was
expected; all are collected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapters.folder import TensorHeader, listed
from adapters.layout import PREFIX, VOCABULARY_MODULES, Layout, module_shapes
from adapters.peft_config import PeftConfig
from adapters.peft_options import shorten
from engine.lora import EMBEDDING, SCORE_HEAD

if TYPE_CHECKING:
    from engine.model_config import ModelSpec

DTYPES = ("F32", "F16", "BF16")
PART_NAMES = {"a": "lora_A", "b": "lora_B"}
SCORE_HEAD_NAMES = ("classifier", "score")
"""What peft adds to modules_to_save for SEQ_CLS, whether the model has them or not."""

Shape = tuple[int, ...]


def check_layout(
    config: PeftConfig,
    layout: Layout,
    tensors: Mapping[str, TensorHeader],
    spec: ModelSpec,
    problems: list[str],
) -> None:
    """Append everything that does not fit to problems."""
    shapes = module_shapes(config, spec)
    if not layout.modules and not layout.replaced:
        problems.append(
            f"no module of the adapter matches this base: it has {_some(tensors) or 'no tensors'}, "
            f"the base has {_some(shapes)}. It was made for another architecture"
        )
        return
    if layout.unexpected:
        problems.append(f"tensors that mean nothing to this base: {_some(layout.unexpected)}")
    problems += [
        f"{key}: dtype {header.dtype}, expected one of {', '.join(DTYPES)}"
        for key, header in tensors.items()
        if header.dtype not in DTYPES
    ]
    _check_targets(config, layout, spec, shapes.keys() - {SCORE_HEAD}, problems)
    for path in sorted(layout.modules):
        _check_parts(config, path, layout.modules[path], problems)
        expected = _expected_shapes(config, path, shapes[path])
        for part, key in layout.modules[path].items():
            hint = _module_hint(config, path, part, tensors[key].shape, expected[part], spec)
            _check_shape(key, tensors[key].shape, expected[part], hint, problems)
    for parameter, key in [*layout.replaced.items(), *layout.base_copies.items()]:
        _check_whole_tensor(parameter, key, tensors[key].shape, shapes, spec, problems)
    _check_saved_modules(config, layout, shapes.keys(), problems)


def _check_targets(
    config: PeftConfig, layout: Layout, spec: ModelSpec, known: set[str], problems: list[str]
) -> None:
    """The modules that the file adapts must be those that the configuration names."""
    if config.target_modules is None:
        return
    targeted = {path for path in known if config.targets(path)}
    found = layout.modules.keys()
    is_tied = config.ensure_weight_tying and spec.tie_word_embeddings
    tied = set(VOCABULARY_MODULES) if is_tied else set()
    if not targeted and not tied:
        names = config.target_modules
        text = shorten(names) if isinstance(names, str) else _some(names)
        problems.append(
            f"target_modules matches no module of this base: found {text}, the base has "
            f"{_some(known)}"
        )
    if targeted - found:
        problems.append(
            f"target_modules names modules without tensors in the file: {_some(targeted - found)}"
        )
    if found - targeted - tied:
        problems.append(
            f"tensors of modules that target_modules does not name: "
            f"{_some(found - targeted - tied)}"
        )


def _check_parts(
    config: PeftConfig, path: str, keys: Mapping[str, str], problems: list[str]
) -> None:
    """A module has both matrices, and a magnitude exactly with DoRA."""
    for part, other in (("a", "b"), ("b", "a")):
        if part not in keys:
            problems.append(f"{path}: {PART_NAMES[other]} has no {PART_NAMES[part]} beside it")
    if config.use_dora and "magnitude" not in keys:
        problems.append(f"{path}: use_dora is set and lora_magnitude_vector is missing")
    if not config.use_dora and "magnitude" in keys:
        problems.append(f"{path}: lora_magnitude_vector is there and use_dora is not set")


def _expected_shapes(config: PeftConfig, path: str, shape: tuple[int, int]) -> dict[str, Shape]:
    """By part. The embedding's LoRA is that of its transpose."""
    rank = config.rank(path)
    out_features, in_features = (shape[1], shape[0]) if path == EMBEDDING else shape
    return {
        "a": (rank, in_features),
        "b": (out_features, rank),
        "bias": (out_features,),
        "magnitude": (out_features,),
    }


def _module_hint(
    config: PeftConfig, path: str, part: str, found: Shape, expected: Shape, spec: ModelSpec
) -> str:
    """Why a part's shape may be wrong: its rank, or a vocabulary of another size."""
    width = {"a": 1, "b": 0}.get(part)
    if width is not None and len(found) == 2 and found[width] == expected[width]:
        return f"; adapter_config.json says rank {config.rank(path)} for it"
    return _vocabulary_hint(spec) if path in VOCABULARY_MODULES else ""


def _check_whole_tensor(
    parameter: str,
    key: str,
    found: Shape,
    shapes: Mapping[str, tuple[int, int]],
    spec: ModelSpec,
    problems: list[str],
) -> None:
    """A replaced or copied tensor has the shape of the base's."""
    path, _, kind = parameter.rpartition(".")
    if kind == "bias" and (path in (EMBEDDING, SCORE_HEAD) or not spec.has_bias(path)):
        problems.append(f"{key.removeprefix(PREFIX)}: this base has no bias there")
        return
    hint = _vocabulary_hint(spec) if path in VOCABULARY_MODULES else ""
    if path == SCORE_HEAD:
        hint = "; score heads have one output, a classifier with several labels is not served"
    expected = shapes[path] if kind == "weight" else shapes[path][:1]
    _check_shape(key, found, expected, hint, problems)


def _check_saved_modules(
    config: PeftConfig, layout: Layout, known: Iterable[str], problems: list[str]
) -> None:
    """What modules_to_save names must be modules that can be replaced, and be in the file."""
    for name in config.modules_to_save:
        paths = [path for path in known if path.endswith(name)]
        missing = [path for path in paths if f"{path}.weight" not in layout.replaced]
        if missing and SCORE_HEAD not in missing:
            problems.append(
                f"modules_to_save names modules without tensors in the file: {_some(missing)}"
            )
        if not paths and name not in SCORE_HEAD_NAMES:
            problems.append(
                f"modules_to_save: {name!r} is not a module that can be replaced; linear layers, "
                f"lm_head, embed_tokens and score can"
            )
    if config.task_type == "SEQ_CLS" and "score.weight" not in layout.replaced:
        problems.append("task_type is SEQ_CLS and score.weight, the score head, is missing")


def _check_shape(key: str, found: Shape, expected: Shape, hint: str, problems: list[str]) -> None:
    if found != expected:
        name = key.removeprefix(PREFIX)
        problems.append(f"{name}: shape {list(found)}, expected {list(expected)}{hint}")


def _vocabulary_hint(spec: ModelSpec) -> str:
    return (
        f"; the base's vocabulary has {spec.vocab_size} tokens. An adapter that resized it needs "
        f"its own base: merge it with peft and serve the result"
    )


def _some(names: Iterable[str]) -> str:
    return listed(sorted(names))
