"""adapter_config.json: which layers a LoRA adapts, at what rank and scale.

Names are matched to layers exactly as peft 0.21 matches them. What is wrong with the file is
collected, not raised, so that all of it can be told at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.folder import CONFIG_FILE, MAX_TEXT_BYTES
from adapters.peft_options import shorten, unsupported_options

Pattern = tuple[tuple[re.Pattern[str], float], ...]
"""Regular expressions for the ends of module paths, and the number of each; the first match counts.

Compiled once: large adapters have one per layer, more than re's own cache holds.
"""
MAX_NUMBER = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The part of adapter_config.json that decides what the tensors mean."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    target_modules: tuple[str, ...] | str | None
    """Names, a regular expression, or None for peft's defaults of the architecture."""
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    use_dora: bool
    ensure_weight_tying: bool
    task_type: str | None
    base_model: str | None

    def regexes(self) -> tuple[str, ...]:
        """Every regular expression that the methods below match with."""
        modules = (self.target_modules, self.exclude_modules)
        return (
            *(pattern for pattern in modules if isinstance(pattern, str)),
            *(regex.pattern for regex, _ in (*self.rank_pattern, *self.alpha_pattern)),
            *map(_saved_regex, self.modules_to_save),
            *map(_layer_regex, self.layers_pattern),
        )

    def targets(self, path: str) -> bool:
        """Whether a module of the base gets a LoRA, by peft's rules."""
        if _matches(self.exclude_modules, path):
            return False
        if any(re.match(_saved_regex(name), path) for name in self.modules_to_save):
            return False
        if self.target_modules is None:
            return False
        if self.target_modules == "all-linear":
            return path.rpartition(".")[2] not in ("lm_head", "embed_tokens", "score")
        if not _matches(self.target_modules, path):
            return False
        if (
            isinstance(self.target_modules, str)
            or path in self.target_modules
            or not self.layers_to_transform
        ):
            return True
        return _layer_index(path, self.layers_pattern) in self.layers_to_transform

    def rank(self, path: str) -> int:
        """The rank of a module's LoRA."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scaling(self, path: str) -> float:
        """What B A is multiplied with: alpha / r, or alpha / sqrt(r) where rank-stabilised.

        Source: arXiv:2106.09685, section 4.1, and arXiv:2312.03732.
        """
        rank, alpha = self.rank(path), _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, path: str) -> bool:
        """Whether modules_to_save names a module; peft compares the ends of the names."""
        return any(path.endswith(name) for name in self.modules_to_save)


def read_config(folder: Path, problems: list[str]) -> PeftConfig | None:
    """Read and check adapter_config.json.

    None when it cannot be understood at all; the reason is in problems.
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            problems.append(f"{CONFIG_FILE} is larger than {MAX_TEXT_BYTES} bytes")
            return None
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(f"{CONFIG_FILE} is missing; peft writes it beside the weights")
        return None
    except (ValueError, RecursionError) as error:
        problems.append(f"{CONFIG_FILE} is not valid JSON: {error}")
        return None
    except OSError as error:
        problems.append(f"{CONFIG_FILE} cannot be read: {error.strerror}")
        return None
    if not isinstance(fields, dict):
        problems.append(f"{CONFIG_FILE} holds a {type(fields).__name__}, expected an object")
        return None
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        problems.append(f"peft_type: found {shorten(peft_type)}; only 'LORA' is served")
        return None
    problems += unsupported_options(fields)
    reader = _Reader(fields, problems)
    config = reader.config()
    return config if reader.is_usable else None


class _Reader:
    """Takes typed values out of the JSON object; for a wrong type a default stands in."""

    def __init__(self, fields: Mapping[str, Any], problems: list[str]) -> None:
        self._fields = fields
        self._problems = problems
        self.is_usable = True
        """Whether layers can be matched at all; not with a broken regular expression."""

    def config(self) -> PeftConfig:
        layers = self._fields.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        config = PeftConfig(
            r=int(self._positive("r", self._fields.get("r", 8), whole=True)),
            lora_alpha=self._positive("lora_alpha", self._fields.get("lora_alpha", 8)),
            use_rslora=self._boolean("use_rslora"),
            rank_pattern=self._pattern("rank_pattern", whole=True),
            alpha_pattern=self._pattern("alpha_pattern"),
            target_modules=self._names_or_regex("target_modules")
            if self._fields.get("target_modules") is not None
            else None,
            exclude_modules=self._names_or_regex("exclude_modules"),
            layers_to_transform=self._integers("layers_to_transform", layers),
            layers_pattern=self._strings("layers_pattern"),
            modules_to_save=self._strings("modules_to_save"),
            use_dora=self._boolean("use_dora"),
            ensure_weight_tying=self._boolean("ensure_weight_tying"),
            task_type=self._fields.get("task_type"),
            base_model=self._optional_string("base_model_name_or_path"),
        )
        if isinstance(config.target_modules, str) and config.layers_to_transform:
            self._problems.append(
                "layers_to_transform has no meaning when target_modules is a regular expression"
            )
        self._compile_all("layers_pattern", config.layers_pattern)
        self._compile_all("modules_to_save", config.modules_to_save)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(config, name)
            self._compile_all(name, (value,) if isinstance(value, str) else ())
        return config

    def _positive(self, name: str, value: object, *, whole: bool = False) -> float:
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= MAX_NUMBER:
            kind = "positive whole number" if whole else "positive number"
            self._problems.append(f"{name}: found {shorten(value)}, expected a {kind}")
            return 1
        return value

    def _boolean(self, name: str) -> bool:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            self._problems.append(f"{name}: found {shorten(value)}, expected true or false")
        return value is True

    def _pattern(self, name: str, *, whole: bool = False) -> Pattern:
        """Keys and numbers, the keys compiled to what peft matches with."""
        value = self._fields.get(name) or {}
        if not isinstance(value, dict):
            self._problems.append(
                f"{name}: found {shorten(value)}, expected an object of names and numbers"
            )
            return ()
        self._compile_all(name, value)
        if not self.is_usable:
            return ()
        return tuple(
            (
                re.compile(rf"(.*\.)?({key})$"),
                self._positive(f"{name}[{key!r}]", number, whole=whole),
            )
            for key, number in value.items()
        )

    def _strings(self, name: str) -> tuple[str, ...]:
        value = self._fields.get(name) or []
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._problems.append(f"{name}: found {shorten(value)}, expected a list of strings")
            return ()
        return tuple(value)

    def _names_or_regex(self, name: str) -> tuple[str, ...] | str:
        value = self._fields.get(name)
        return value if isinstance(value, str) else self._strings(name)

    def _integers(self, name: str, value: object) -> tuple[int, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            self._problems.append(f"{name}: found {shorten(value)}, expected whole numbers")
            return ()
        return tuple(value)

    def _optional_string(self, name: str) -> str | None:
        value = self._fields.get(name)
        return value if isinstance(value, str) else None

    def _compile_all(self, name: str, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                found = shorten(pattern)
                self._problems.append(f"{name}: {found} is not a regular expression: {error}")
                self.is_usable = False


def _matches(names: tuple[str, ...] | str, path: str) -> bool:
    """A regular expression must match the whole path; a name is the path or ends it."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def _saved_regex(name: str) -> str:
    return rf"(^|.*\.){name}($|\..*)"


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."


def _layer_index(path: str, patterns: tuple[str, ...]) -> int | None:
    """The number of the layer a path lies in.

    Patterns name the list of layers; without any, every list counts.
    """
    regexes = list(map(_layer_regex, patterns))
    for regex in regexes or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        match = re.match(regex, path)
        if match is not None:
            return int(match["index"])
    return None


def _by_pattern(pattern: Pattern, path: str, default: float) -> float:
    return next((value for regex, value in pattern if regex.match(path)), default)
