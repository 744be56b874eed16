"""Records that hold conversations, in the shapes in which they are published, to Chat samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from server.datasets.problems import BadRecord
from server.datasets.samples import Chat, conversation, message, objects, require, text, tool
from server.message_schemas import Message

Record = Mapping[str, Any]


def read_chat(record: Record, name: str = "messages") -> Chat:
    """OpenAI's chat format and TRL's: {"messages": [{"role", "content", "weight"?}], "tools"?}."""
    for old in ("functions", "function_call"):
        found = record.get(old)
        require(found is None, old, "no such field: it is deprecated, use tools", found)
    parallel = record.get("parallel_tool_calls")
    is_flag = parallel is None or isinstance(parallel, bool)
    require(is_flag, "parallel_tool_calls", "true or false", parallel)
    messages, weights = [], []
    for index, fields in enumerate(objects(record, name)):
        where = f"{name}[{index}]"
        given = {key: value for key, value in fields.items() if value is not None}
        weight = _weight(given, given.get("role"), where)
        given.pop("weight", None)
        messages.append(message(given, where))
        weights.append(weight)
    return Chat(messages=tuple(messages), weights=tuple(weights), tools=read_tools(record))


def read_tools(record: Record) -> tuple[dict[str, Any], ...]:
    """`tools`: OpenAI's, bare functions, or either of them as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return ()
    require(isinstance(tools, list), "tools", "a list", tools)
    assert isinstance(tools, list)
    wrapped = [
        {"type": "function", "function": entry}
        if isinstance(entry, dict) and "name" in entry and "function" not in entry
        else entry
        for entry in tools
    ]
    return tuple(tool(entry, f"tools[{index}]") for index, entry in enumerate(wrapped))


_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


def read_sharegpt(record: Record) -> Chat:
    """{"conversations": [{"from", "value", "weight"?}], "system"?, "tools"?}."""
    turns = objects(record, "conversations")
    if all("role" in turn and "from" not in turn for turn in turns):
        first = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        return read_chat({**record, "conversations": [*first, *turns]}, "conversations")
    if record.get("system"):
        turns = [{"from": "system", "value": text(record, "system")}, *turns]
    messages: list[Message] = []
    weights: list[float] = []
    call_id = ""
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        require(role, f"{where}.from", f"one of {', '.join(_SHAREGPT_ROLES)}", speaker)
        require(isinstance(turn.get("value"), str), f"{where}.value", "a text", turn.get("value"))
        fields: dict[str, Any] = {"role": role, "content": turn["value"]}
        if speaker == "function_call":
            calls = _calls(turn["value"], f"{where}.value", f"call_{index}")
            call_id = calls[-1]["id"]
            fields = {"role": role, "tool_calls": calls}
        elif role == "tool":
            require(call_id, f"{where}.from", "a function_call before it", speaker)
            fields["tool_call_id"] = call_id
        messages.append(message(fields, where))
        weights.append(_weight(turn, role, where))
    return Chat(messages=tuple(messages), weights=tuple(weights), tools=read_tools(record))


def _calls(value: str, where: str, call_id: str) -> list[dict[str, Any]]:
    """A function_call's text, {"name", "arguments"} or a list of them, as OpenAI's tool_calls."""
    parsed = _json(value, where)
    calls = parsed if isinstance(parsed, list) else [parsed]
    require(calls, where, "at least one call", value)
    out = []
    for index, call in enumerate(calls):
        is_call = isinstance(call, dict) and isinstance(call.get("name"), str)
        require(is_call, where, 'JSON text {"name": …, "arguments": {…}}', value)
        arguments = call.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        function = {"name": call["name"], "arguments": written}
        out.append({"id": f"{call_id}_{index}", "type": "function", "function": function})
    return out


def alpaca_turns(record: Record) -> list[tuple[str, str]]:
    """All but the answer of {"instruction", "input"?, "system"?, "history"?}: (role, text)."""
    turns = [("system", text(record, "system"))] if record.get("system") else []
    history = record.get("history") or []
    require(isinstance(history, list), "history", "a list of [question, answer]", history)
    for index, pair in enumerate(history):
        is_pair = (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        )
        require(is_pair, f"history[{index}]", "[question, answer]", pair)
        turns += [("user", pair[0]), ("assistant", pair[1])]
    parts = (text(record, "instruction"), text(record, "input", ""))
    return [*turns, ("user", "\n\n".join(part for part in parts if part))]


def read_alpaca(record: Record) -> Chat:
    """{"instruction", "input"?, "output", "system"?, "history"?}."""
    return conversation([*alpaca_turns(record), ("assistant", text(record, "output"))])


def read_seed_tasks(record: Record) -> list[Chat]:
    """Self-Instruct's tasks: {"instruction", "instances": [{"input", "output"}]}, one sample
    each."""
    instruction = {"instruction": text(record, "instruction")}
    return [read_alpaca({**instance, **instruction}) for instance in objects(record, "instances")]


_GUANACO = re.compile(r"\s*### ?(Human|Assistant):")
_CHIP2 = re.compile(r"(?:\A|\n)\s*<(human|bot)>:")
_HH = re.compile(r"(?:\A|\n)\s*\n(Human|Assistant):")
_SPEAKERS = {"human": "user", "assistant": "assistant", "bot": "assistant"}


def is_guanaco_text(value: object) -> bool:
    """### Human: …### Assistant: …"""
    return _has_turns(value, _GUANACO)


def is_chip2_text(value: object) -> bool:
    """<human>: … and <bot>: … on lines of their own."""
    return _has_turns(value, _CHIP2)


def is_hh_text(value: object) -> bool:
    """Human: … and Assistant: …, each after an empty line."""
    return _has_turns(value, _HH)


def _has_turns(value: object, marker: re.Pattern[str]) -> bool:
    return isinstance(value, str) and {"user", "assistant"} <= {
        _SPEAKERS[match[1].lower()] for match in marker.finditer(value)
    }


def read_guanaco_text(record: Record) -> Chat:
    """oasst1 as Guanaco was trained on it: {"text"}."""
    return conversation(_turns(text(record, "text"), _GUANACO))


def read_chip2_text(record: Record) -> Chat:
    return conversation(_turns(text(record, "text"), _CHIP2))


def hh_turns(value: str) -> list[tuple[str, str]]:
    return _turns(value, _HH)


def _turns(value: str, marker: re.Pattern[str]) -> list[tuple[str, str]]:
    """(role, text) of each turn of a conversation written as one text; what stands before the first
    marker is the system message."""
    matches = list(marker.finditer(value))
    require(matches, "text", "turns of a conversation as in the lines before", value)
    header = value[: matches[0].start()].strip()
    turns = [("system", header)] if header else []
    ends = [match.start() for match in matches[1:]] + [len(value)]
    for match, end in zip(matches, ends, strict=True):
        turns.append((_SPEAKERS[match[1].lower()], value[match.end() : end].strip()))
    return turns


def _weight(fields: Record, role: object, where: str) -> float:
    """How much a message counts: by default the assistant's 1, others 0."""
    weight = fields.get("weight")
    if weight is None:
        return float(role == "assistant")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    require(is_number and 0 <= weight <= 1, f"{where}.weight", "a number from 0 to 1", weight)
    is_learnt = role == "assistant" or weight == 0
    require(is_learnt, f"{where}.weight", "a weight on the assistant's messages only", weight)
    return float(weight)


def _json(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: expected JSON text: {error}.") from error
