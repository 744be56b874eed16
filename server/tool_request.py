"""What a request says about tools, checked: `tools` and `tool_choice` in OpenAI's shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError

MAX_TOOLS = 128
"""As OpenAI's."""
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """tool_choice, resolved: how many calls at least, and of which tools."""

    is_required: bool
    functions: tuple[dict[str, Any], ...]
    is_single: bool = False


def require(condition: object, param: str, expected: str, found: object) -> None:
    """Refuse the request, naming the parameter, unless the condition holds."""
    if not condition:
        shown = json.dumps(found, default=repr)
        shown = shown if len(shown) <= 200 else shown[:200] + "…"
        raise RequestError(f"{param}: expected {expected}, got {shown}.", param=param)


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[dict[str, Any], ...]:
    """The functions of a request's `tools`, checked."""
    if not tools:
        return ()
    require(isinstance(tools, list | tuple), "tools", "a list", tools)
    require(len(tools) <= MAX_TOOLS, "tools", f"at most {MAX_TOOLS} tools", f"{len(tools)} tools")
    functions: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        require(isinstance(tool, Mapping), where, "an object", tool)
        require(tool.get("type") == "function", f"{where}.type", '"function"', tool.get("type"))
        function = tool.get("function")
        require(isinstance(function, Mapping), f"{where}.function", "an object", function)
        assert isinstance(function, Mapping)
        name = function.get("name")
        require(
            isinstance(name, str) and NAME.fullmatch(name),
            f"{where}.function.name",
            "1 to 64 letters, digits, underscores or hyphens",
            name,
        )
        require(
            all(name != other["name"] for other in functions),
            f"{where}.function.name",
            "a name used once",
            name,
        )
        description = function.get("description")
        require(
            description is None or isinstance(description, str),
            f"{where}.function.description",
            "a string",
            description,
        )
        parameters = function.get("parameters")
        where_parameters = f"{where}.function.parameters"
        require(
            parameters is None or isinstance(parameters, Mapping),
            where_parameters,
            "a JSON schema object",
            parameters,
        )
        if parameters:
            require(
                parameters.get("type", "object") == "object",
                f"{where_parameters}.type",
                '"object"',
                parameters.get("type"),
            )
        strict = function.get("strict")
        require(
            strict is None or isinstance(strict, bool),
            f"{where}.function.strict",
            "true or false",
            strict,
        )
        functions.append(dict(function))
    return tuple(functions)


def read_choice(
    choice: str | Mapping[str, Any] | None, functions: tuple[dict[str, Any], ...]
) -> Choice:
    """Which of the functions the model may or must call."""
    if choice is None or choice == "none" or (choice == "auto" and not functions):
        return Choice(is_required=False, functions=functions if choice is None else ())
    if isinstance(choice, str):
        require(choice in ("auto", "required"), "tool_choice", _CHOICES, choice)
        require(functions, "tool_choice", '"none" where there are no tools', choice)
        return Choice(is_required=choice == "required", functions=functions)
    require(isinstance(choice, Mapping), "tool_choice", _CHOICES, choice)
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        require(isinstance(allowed, Mapping), "tool_choice.allowed_tools", "an object", allowed)
        mode = allowed.get("mode", "auto")
        require(
            mode in ("auto", "required"),
            "tool_choice.allowed_tools.mode",
            '"auto" or "required"',
            mode,
        )
        listed = allowed.get("tools")
        require(
            isinstance(listed, list | tuple) and listed,
            "tool_choice.allowed_tools.tools",
            "a list",
            listed,
        )
        names = [
            _chosen_name(entry, functions, "tool_choice.allowed_tools.tools")
            for entry in listed or ()
        ]
        kept = tuple(function for function in functions if function["name"] in names)
        return Choice(is_required=mode == "required", functions=kept)
    name = _chosen_name(choice, functions, "tool_choice")
    kept = tuple(function for function in functions if function["name"] == name)
    return Choice(is_required=True, functions=kept, is_single=True)


def _chosen_name(entry: object, functions: tuple[dict[str, Any], ...], where: str) -> str:
    require(isinstance(entry, Mapping) and entry.get("type") == "function", where, _CHOICES, entry)
    assert isinstance(entry, Mapping)
    function = entry.get("function", entry)
    name = function.get("name") if isinstance(function, Mapping) else None
    known = [function["name"] for function in functions]
    require(name in known, f"{where}.function.name", f"one of the tools {known}", name)
    return str(name)
