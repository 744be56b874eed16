"""Records that hold a better and a worse answer, in the shapes in which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.datasets.chat_records import alpaca_turns, hh_turns, read_chat, read_sharegpt
from server.datasets.problems import BadRecord
from server.datasets.samples import Chat, Pair, Plain, conversation, objects, require, text

Record = Mapping[str, Any]


def read_openai_preference(record: Record) -> Pair:
    """{"input": {"messages", "tools"?}, "preferred_output": [...], "non_preferred_output":
    [...]}."""
    asked = record.get("input")
    require(isinstance(asked, dict), "input", "an object with messages", asked)
    assert isinstance(asked, dict)
    prompt = read_chat(asked)
    return _pair(
        _joined(prompt, record, "preferred_output"),
        _joined(prompt, record, "non_preferred_output"),
    )


def read_alpaca_preference(record: Record) -> Pair:
    """{"instruction", "input"?, "system"?, "history"?, "chosen", "rejected"}."""
    turns = alpaca_turns(record)
    return _pair(
        *(conversation([*turns, ("assistant", text(record, n))]) for n in ("chosen", "rejected"))
    )


def read_sharegpt_preference(record: Record) -> Pair:
    """{"conversations": [...], "chosen": {"from", "value"}, "rejected": {"from", "value"}}."""
    turns = objects(record, "conversations")
    for name in ("chosen", "rejected"):
        require(isinstance(record[name], dict), name, "one message as an object", record[name])
    return _pair(
        *(
            read_sharegpt({**record, "conversations": [*turns, record[name]]})
            for name in ("chosen", "rejected")
        )
    )


def read_hh(record: Record) -> Pair:
    """hh-rlhf: two dialogues as text."""
    return _pair(*(conversation(hh_turns(text(record, n))) for n in ("chosen", "rejected")))


def read_preference(record: Record) -> Pair:
    """TRL's: {"prompt"?, "chosen", "rejected"}, each a text or a list of messages."""
    if isinstance(record["chosen"], list):
        return _pair(_trl_side(record, "chosen"), _trl_side(record, "rejected"))
    chosen, rejected = text(record, "chosen"), text(record, "rejected")
    if "prompt" in record:
        prompt = text(record, "prompt")
    else:  # what both begin with, up to the end of a word
        differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        common = chosen[: next(differ, min(len(chosen), len(rejected)))]
        prompt = common[: max(common.rfind(" "), common.rfind("\n"), 0)]
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    return _pair(Plain(prompt=prompt, answer=chosen), Plain(prompt=prompt, answer=rejected))


def _trl_side(record: Record, name: str) -> Chat:
    """One answer with what precedes it; a list that does not begin with the assistant holds it
    all."""
    answer, prompt = objects(record, name), record.get("prompt")
    if isinstance(prompt, list):
        return _joined(read_chat({**record, "messages": prompt}), record, name)
    if prompt is not None and answer[0].get("role") == "assistant":
        asked = {"role": "user", "content": text(record, "prompt")}
        return read_chat({"messages": [asked, *answer], "tools": record.get("tools")})
    return read_chat(record, name)


def _joined(prompt: Chat, record: Record, name: str) -> Chat:
    answer = read_chat({name: objects(record, name)}, name)
    return Chat(
        messages=prompt.messages + answer.messages,
        weights=prompt.weights + answer.weights,
        tools=prompt.tools,
    )


def _pair(chosen: Chat | Plain, rejected: Chat | Plain) -> Pair:
    if chosen == rejected:
        raise BadRecord("the better and the worse answer are the same. Remove the line.")
    for side in (chosen, rejected):
        if isinstance(side, Chat) and side.messages[-1].role != "assistant":
            raise BadRecord("each of the two answers must end in a message of the assistant.")
    return Pair(chosen=chosen, rejected=rejected)
