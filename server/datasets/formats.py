"""The formats that are recognised, by their fields, and how each becomes samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.train.token_dataset import Kind
from server.datasets.chat_records import (
    is_chip2_text,
    is_guanaco_text,
    is_hh_text,
    read_alpaca,
    read_chat,
    read_chip2_text,
    read_guanaco_text,
    read_seed_tasks,
    read_sharegpt,
)
from server.datasets.preference_records import (
    read_alpaca_preference,
    read_hh,
    read_openai_preference,
    read_preference,
    read_sharegpt_preference,
)
from server.datasets.problems import BadRecord
from server.datasets.samples import Chat, Plain, Sample, text

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write a sample down."""

    name: str
    needs: tuple[str, ...]
    """Fields by which it is recognised."""
    read: Callable[[Record], Sample | Sequence[Sample]]
    may_have: tuple[str, ...] = ()
    """Further fields that mean something."""
    is_text: Callable[[object], bool] | None = None
    """What the last of the needed fields must look like besides."""
    kind: Kind = "supervised"
    """What it is for; prompts can be taken from all."""

    def matches(self, record: Record) -> bool:
        if any(name not in record for name in self.needs):
            return False
        return self.is_text is None or self.is_text(record[self.needs[-1]])

    def serves(self, kind: Kind) -> bool:
        return kind in (self.kind, "prompt")

    def shape(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})"


def _read_completion(record: Record) -> Sample:
    """OpenAI's older format, Self-Instruct's and TRL's: {"prompt", "completion"}."""
    if isinstance(record.get("label"), bool):
        raise BadRecord(
            "label: answers that are marked good or bad one by one are not supported. Pair them "
            "(prompt, chosen, rejected), or remove the bad ones and the field."
        )
    if isinstance(record["prompt"], list):
        prompt = read_chat(record, "prompt")
        answer = read_chat({"completion": record["completion"]}, "completion")
        return Chat(
            messages=prompt.messages + answer.messages,
            weights=tuple(0.0 for _ in prompt.weights) + answer.weights,
            tools=prompt.tools,
        )
    return Plain(prompt=text(record, "prompt"), answer=text(record, "completion"))


def _read_prompt(record: Record) -> Sample:
    """TRL's {"prompt"}: a text or messages, to be answered by the policy."""
    if isinstance(record["prompt"], list):
        return read_chat(record, "prompt")
    return Plain(prompt=text(record, "prompt"), answer="")


def _read_input_output(record: Record) -> Sample:
    return Plain(prompt=text(record, "input", ""), answer=text(record, "output"))


def _read_text(record: Record) -> Sample:
    return Plain(prompt="", answer=text(record, "text"))


_TOOLS = ("tools", "parallel_tool_calls")
_ALPACA = ("input", "system", "history")
FORMATS = (
    Format(
        name="openai-preference", kind="preference", read=read_openai_preference,
        needs=("input", "preferred_output", "non_preferred_output"),
    ),
    Format(
        name="alpaca-preference", kind="preference", read=read_alpaca_preference,
        needs=("instruction", "chosen", "rejected"), may_have=_ALPACA,
    ),
    Format(
        name="sharegpt-preference", kind="preference", read=read_sharegpt_preference,
        needs=("conversations", "chosen", "rejected"), may_have=("system", *_TOOLS),
    ),
    Format(
        name="hh-rlhf", kind="preference", read=read_hh, needs=("rejected", "chosen"),
        is_text=is_hh_text,
    ),
    Format(
        name="preference", kind="preference", read=read_preference, needs=("chosen", "rejected"),
        may_have=("prompt", *_TOOLS),
    ),
    Format(name="chat", read=read_chat, needs=("messages",), may_have=_TOOLS),
    Format(
        name="sharegpt", read=read_sharegpt, needs=("conversations",), may_have=("system", *_TOOLS)
    ),
    Format(name="self-instruct", read=read_seed_tasks, needs=("instruction", "instances")),
    Format(name="alpaca", read=read_alpaca, needs=("instruction", "output"), may_have=_ALPACA),
    Format(
        name="prompt-completion", read=_read_completion, needs=("prompt", "completion"),
        may_have=("label", *_TOOLS),
    ),
    Format(name="input-output", read=_read_input_output, needs=("input", "output")),
    Format(
        name="oasst1", read=read_guanaco_text, needs=("text",), is_text=is_guanaco_text
    ),
    Format(name="chip2", read=read_chip2_text, needs=("text",), is_text=is_chip2_text),
    Format(name="text", read=_read_text, needs=("text",)),
    Format(name="prompt", kind="prompt", read=_read_prompt, needs=("prompt",), may_have=_TOOLS),
)  # fmt: skip
"""The first that matches and serves the method is taken."""


def recognise(record: Record, kind: Kind) -> Format | None:
    """The format of a record, preferably one that holds the kind of data asked for."""
    found = [form for form in FORMATS if form.matches(record)]
    return next((form for form in found if form.serves(kind)), found[0] if found else None)


def unknown(record: Record) -> BadRecord:
    shapes = "; ".join(form.shape() for form in FORMATS)
    return BadRecord(f"no known format: the fields are {_names(record)}. Known are {shapes}.")


def other_than(form: Format, record: Record, kind: Kind) -> BadRecord:
    """A record that is not of the file's format."""
    other = recognise(record, kind)
    found = f"format {other.name}" if other is not None else f"the fields {_names(record)}"
    return BadRecord(
        f"expected format {form.shape()} as in the lines before, got {found}. A file holds one "
        f"format; split it."
    )


def _names(record: Record) -> str:
    names = ", ".join(repr(name[:40]) for name in list(record)[:8])
    return (names or "none") + (" …" if len(record) > 8 else "")
