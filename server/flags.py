"""Command-line flags from config dataclasses: one flag per field, its docstring is its help.

A field `max_model_len: int | None = None` followed by a string literal becomes
`--max-model-len`; a bool becomes `--flag / --no-flag`; a tuple may be repeated; a Literal offers
its choices. The unit in `timeout_s` is shown as the value's name, not in the flag.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from typing import Any, TypeVar

Config = TypeVar("Config")
SECONDS = "_s"


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one group of flags, titled by the first line of the class's docstring."""
    title = inspect.getdoc(config_class) or config_class.__name__
    group = parser.add_argument_group(title.splitlines()[0].rstrip("."))
    docs = field_docstrings(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in docs:
            raise TypeError(f"{config_class.__name__}.{field.name} has no docstring for its help")
        default = _default(field)
        group.add_argument(
            "--" + field.name.removesuffix(SECONDS).replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{docs[field.name]} {_shown_default(default)}".strip().replace("%", "%%"),
            **_argparse_kind(hints[field.name], is_time=field.name.endswith(SECONDS)),
        )


def from_args(config_class: type[Config], args: argparse.Namespace) -> Config:
    """Build the config from the flags that were given; absent ones keep the field's default.

    Raises:
        ValueError: a value is out of range, as the config's own checks say.
    """
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if hasattr(args, field.name)
    }
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def field_docstrings(config_class: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for field, literal in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(literal, ast.Expr):
            text = ast.literal_eval(literal.value)
            docs[typing.cast(ast.Name, field.target).id] = " ".join(text.split())
    return docs


def _argparse_kind(hint: Any, *, is_time: bool) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return {"action": "append", "type": typing.get_args(hint)[0], "metavar": "VALUE"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    metavar = "SECONDS" if is_time else {int: "N", float: "X", str: "TEXT"}[hint]
    return {"type": hint, "metavar": metavar}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown_default(default: Any) -> str:
    if default is None or default in ((), ""):
        return ""
    if isinstance(default, bool):
        return f"(default: {'on' if default else 'off'})"
    return f"(default: {default})"
