"""Checked reading of a JSON file's fields: problems are collected and raised in one error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_REQUIRED: Any = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, unreadable, no JSON or no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file. A model folder in Hugging Face format has it; check the path "
            f"or download it again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. Check the file or download it again."
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON: {error}. Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


class Fields:
    """A JSON object. A wrong field is recorded and a harmless value returned in its place."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        prefix: str = "",
        problems: list[str] | None = None,
    ):
        self.path = path
        self._values = values
        self._prefix = prefix
        self._problems: list[str] = [] if problems is None else problems

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        value = self._values.get(name)
        return default if value is None else value

    def child(self, name: str) -> Fields:
        """A nested object; an absent one is empty."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            self.problem(name, "an object")
            value = {}
        return Fields(self.path, value, f"{self._prefix}{name}.", self._problems)

    def problem(self, name: str, expected: str, found: object = _REQUIRED) -> None:
        """Record that a field is not as it should be."""
        value = self._values.get(name) if found is _REQUIRED else found
        self._problems.append(f"{self._prefix}{name}: expected {expected}, found {_shown(value)}")

    def integer(
        self, name: str, *, default: Any = _REQUIRED, minimum: int = 1, maximum: int = 1 << 31
    ) -> Any:
        """A whole number within limits, or the default; required when there is none."""
        value = self.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.problem(name, f"a whole number of at least {minimum}")
            return minimum
        if value > maximum:
            self.problem(name, f"at most {maximum}")
            return minimum
        return value

    def number(self, name: str, *, default: Any = _REQUIRED, above: float | None = None) -> Any:
        """A finite number above a limit, or the default; required when there is none."""
        value = self.get(name)
        if value is None and default is not _REQUIRED:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e30 or (above is not None and value <= above):
            self.problem(name, "a number" if above is None else f"a number above {above:g}")
            return 1.0
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.problem(name, "true or false")
            return default
        return value

    def text(self, name: str, *, default: str) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            self.problem(name, "a string")
            return default
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; absent means none."""
        value = self.get(name, ())
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            self.problem(name, "a token id or a list of token ids")
            return ()
        return tuple(dict.fromkeys(ids))

    def raise_problems(self) -> None:
        """Raises CheckpointError with every problem so far, those of nested objects too."""
        if self._problems:
            problems = "\n  ".join(self._problems)
            raise CheckpointError(
                f"{self.path} describes a model that cannot be served:\n  {problems}\n"
                f"Correct the file or take another checkpoint."
            )


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr) if value is not None else "nothing"
    return text if len(text) <= 80 else text[:77] + "..."
