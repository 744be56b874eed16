"""Tools and earlier calls as a chat template can take them: natively, or as plain text.

Messages are dicts of OpenAI's shapes. Nothing here fails on a message's content: what a client says
that an earlier call was is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from server.tool_parser import CALL_BEGIN, CALL_END


def tool_prompt(functions: Iterable[Mapping[str, Any]]) -> str:
    """The section of the system message for models whose template knows no tools."""
    listed = "\n".join(json.dumps(dict(function), ensure_ascii=False) for function in functions)
    return (
        "You can call these functions, one JSON object per line:\n\n"
        f"{listed}\n\n"
        "To call a function, write its name and arguments as JSON between markers, like this:\n\n"
        f"{CALL_BEGIN}\n"
        '{"name": "function_name", "arguments": {"argument": "value"}}\n'
        f"{CALL_END}\n\n"
        "The result then comes between <tool_response> and </tool_response>. Call a function only "
        "when it helps; "
        "otherwise answer in plain text."
    )


def add_to_system(messages: list[dict[str, Any]], section: str) -> list[dict[str, Any]]:
    """Put a section at the end of the first system message, or before all others."""
    if messages and messages[0].get("role") == "system":
        first = {**messages[0], "content": _join(_text(messages[0].get("content")), section)}
        return [first, *messages[1:]]
    return [{"role": "system", "content": section}, *messages]


def native_messages(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates that know tools expect them: a call's arguments are an object, not JSON
    text."""
    out = []
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and calls:
            calls = [
                {**call, "function": {**call["function"], "arguments": _arguments(call)}}
                for call in calls
            ]
            message = {**message, "content": message.get("content") or "", "tool_calls": calls}
        out.append(message)
    return out


def plain_messages(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for templates that know no tools: calls as text of the assistant, results as text of
    the user."""
    out: list[dict[str, Any]] = []
    # Templates want user and assistant in turn, so what follows a result joins its message.
    after_result = False
    for message in messages:
        role = message.get("role")
        if role == "tool":
            text = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            message = {"role": "user", "content": text}
        elif role == "assistant" and message.get("tool_calls"):
            text = _text(message.get("content"))
            for call in message["tool_calls"]:
                written = json.dumps(
                    {"name": call["function"]["name"], "arguments": _arguments(call)},
                    ensure_ascii=False,
                )
                text = _join(text, f"{CALL_BEGIN}\n{written}\n{CALL_END}", "\n")
            message = {key: value for key, value in message.items() if key != "tool_calls"} | {
                "content": text
            }
        if after_result and message.get("role") == "user":
            joined = _join(_text(out[-1]["content"]), _text(message.get("content")), "\n")
            out[-1] = {**out[-1], "content": joined}
        else:
            out.append(message)
        after_result = role == "tool"
    return out


def _arguments(call: Mapping[str, Any]) -> object:
    """A call's arguments as an object; as they are, where a client sends text that is no JSON."""
    arguments = call["function"].get("arguments", "{}")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _text(content: object) -> str:
    """Content as one string: text parts are joined."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content or "")


def _join(first: str, second: str, separator: str = "\n\n") -> str:
    return first + separator + second if first and second else first or second
