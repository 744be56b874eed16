"""Find tool calls in generated text, piece by piece: content out, calls out, markers never.

A call is written as the Hermes and Qwen models write it,

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

or, at the very start of the text only, as the bare object {"name": …, "parameters": …} that Llama 3
was taught. What comes out depends on the text alone, never on where it was cut: parsing whole
equals parsing streamed.

- A call is reported once its object is complete and names a known tool. Anything else that looks
  like a call (broken JSON, unknown tool, cut off by max_tokens) is content, unchanged.
- Where a grammar guarantees well-formed calls, they are streamed as they are written: first the
  name, then fragments of the arguments. One that max_tokens cuts off ends early, as OpenAI's do.
- White space before a call is dropped, and so is what follows the last; text without calls comes
  out unchanged.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"
MAX_FALSE_CALLS = 32
"""After so many markers without a call behind them the rest is content: a text full of markers must
not be searched from each of them."""

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([\w.-]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


def _partial_header() -> re.Pattern[str]:
    """What fully matches every beginning of a text that _HEADER matches."""
    space = r"\s*"
    opening = [space, r"\{", space, *'"name"', space, ":", space, '"', r"[\w.-]*", '"', space]
    keys = [_beginnings([*key, '"', space, ":", space]) for key in ("arguments", "parameters")]
    return re.compile(_beginnings([*opening, ",", space, '"', "(?:" + "|".join(keys) + ")"]))


def _beginnings(parts: list[str]) -> str:
    """A pattern of the first n parts in a row, for every n."""
    return "(?:".join(parts) + ")?" * (len(parts) - 1)


_PARTIAL_HEADER = _partial_header()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A new call (id and name set) or more of the arguments of the call with this index."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """JSON text, or the next piece of it."""

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape: an entry of delta.tool_calls."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedDelta:
    """What a piece of text adds."""

    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One complete call."""

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape: an entry of message.tool_calls."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ToolCallParser:
    """One per generated text. push() each piece, then finish() once; num_calls tells how many calls
    were reported."""

    def __init__(
        self,
        names: Collection[str],
        *,
        guaranteed: bool = False,
        parallel: bool = True,
        new_id: Callable[[], str] = lambda: "call_" + secrets.token_hex(12),
    ) -> None:
        self._names = frozenset(names)
        self._guaranteed = guaranteed
        self._parallel = parallel
        self._new_id = new_id
        self._state: Callable[[bool], bool] = self._content if guaranteed else self._start
        self._buffer = ""
        self._held_space = ""  # white space before a call's marker: dropped if the call is one
        self._is_behind_call = False
        self._has_content = False
        self._object = _ObjectScanner()
        self._streamed: int | None = (
            None  # guaranteed calls: how much of the buffer has been reported
        )
        self._content_out: list[str] = []
        self._calls_out: list[ToolCallDelta] = []
        self._num_false_calls = 0
        self.num_calls = 0

    @property
    def is_complete(self) -> bool:
        """No later text can matter: one call was allowed, and it is there. The request may be
        cancelled."""
        return not self._parallel and self.num_calls > 0 and self._state == self._after

    def push(self, text: str) -> ParsedDelta:
        """Take the next piece of text; returns what is certain by now."""
        if self.is_complete:
            return ParsedDelta()
        self._buffer += text
        while self._state(False):
            pass
        return self._take()

    def finish(self) -> ParsedDelta:
        """The text has ended: returns what was held back."""
        if not self.is_complete:
            while self._state(True):
                pass
        return self._take()

    def _take(self) -> ParsedDelta:
        delta = ParsedDelta(content="".join(self._content_out), tool_calls=tuple(self._calls_out))
        self._content_out, self._calls_out = [], []
        return delta

    # Each state looks at the buffer and returns whether there is more to do with the text at hand;
    # is_last: no more text will come.

    def _start(self, is_last: bool) -> bool:
        """At the very start: is this a bare call?"""
        match = _HEADER.match(self._buffer)
        if match and match[1] in self._names:
            self._begin_call(self._bare_call)
            return True
        if not match and not is_last and _PARTIAL_HEADER.fullmatch(self._buffer):
            return False
        self._state = self._content
        return True

    def _content(self, is_last: bool) -> bool:
        """Plain text, watching for the marker."""
        before, marker, rest = self._buffer.partition(CALL_BEGIN)
        if marker and self._num_false_calls >= MAX_FALSE_CALLS:
            before, marker = self._buffer, ""
        if marker:
            kept = before.rstrip()
            self._write(kept)
            self._held_space = before[len(kept) :]
            self._buffer = rest
            self._begin_call(self._marked_call)
            return True
        is_marker = self._guaranteed and CALL_BEGIN.startswith(before.strip())
        if is_last and is_marker and not self._has_content:
            before = ""  # max_tokens cut the marker off
        num_safe = len(before) if is_last else len(before) - _num_held(before)
        if not self._is_behind_call or not before.isspace():
            self._write(before[:num_safe])
        self._buffer = before[num_safe:]
        return False

    def _write(self, content: str) -> None:
        if not content:
            return
        if self._is_behind_call and not self._has_content:
            content = content.lstrip()
        self._is_behind_call = False
        self._has_content = True
        self._content_out.append(content)

    def _begin_call(self, state: Callable[[bool], bool]) -> None:
        self._state = state
        self._object = _ObjectScanner()
        self._streamed = None

    def _marked_call(self, is_last: bool) -> bool:
        return self._call(is_last, self._held_space + CALL_BEGIN)

    def _bare_call(self, is_last: bool) -> bool:
        return self._call(is_last, "")

    def _call(self, is_last: bool, opening: str) -> bool:
        """Inside a call, its object not complete yet; `opening` is what it becomes if it is
        none."""
        end = self._object.scan(self._buffer)
        if self._guaranteed:
            self._stream_arguments()
        if end is None:
            if not is_last:
                return False
            if self._guaranteed:  # cut off by max_tokens
                self._buffer = ""
                return False
        call = _read_call(self._buffer[:end], self._names) if end else None
        if self._streamed is None:
            if call is None:
                self._num_false_calls += 1
                self._write(opening)
                self._state = self._content
                return True
            name, arguments = call
            self._report(name, arguments)
        self._buffer = self._buffer[end:]
        self._state = self._after
        return self._parallel

    def _after(self, is_last: bool) -> bool:
        """Behind a call: its end marker, which models sometimes forget."""
        rest = self._buffer.lstrip()
        if not rest.startswith(CALL_END) and CALL_END.startswith(rest):
            if is_last:
                self._buffer = ""
            return False
        self._buffer = rest.removeprefix(CALL_END)
        self._is_behind_call = True
        self._state = self._content
        return True

    def _report(self, name: str, arguments: str) -> None:
        self._calls_out.append(
            ToolCallDelta(index=self.num_calls, id=self._new_id(), name=name, arguments=arguments)
        )
        self.num_calls += 1

    def _stream_arguments(self) -> None:
        """Report the name once it is known, then the arguments up to where the object has been
        scanned."""
        if self._streamed is None:
            header = _HEADER.match(self._buffer)
            if not header or header[1] not in self._names or header.end() >= len(self._buffer):
                return
            self._report(header[1], "")
            self._streamed = header.end()
        stop = self._object.end_of_inner or self._object.position
        if stop > self._streamed:
            fragment = self._buffer[self._streamed : stop]
            self._calls_out.append(ToolCallDelta(index=self.num_calls - 1, arguments=fragment))
            self._streamed = stop


class _ObjectScanner:
    """Where does a JSON object end? Counts brackets outside strings; goes on where it stopped."""

    def __init__(self) -> None:
        self.position = 0
        self.end_of_inner: int | None = None  # behind the last bracket that closed at depth one
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._end: int | None = None

    def scan(self, text: str) -> int | None:
        """End of the object that text (the same text as before, or longer) begins with; 0 if it
        begins with none."""
        while self._end is None and self.position < len(text):
            char = text[self.position]
            self.position += 1
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char in "{[":
                self.end_of_inner = None
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self.end_of_inner = self.position
                elif self._depth <= 0:
                    self._end = self.position if self._depth == 0 else 0
            elif self._depth == 0 and not char.isspace():
                self._end = 0
            elif char == '"':
                self._in_string = True
        return self._end


def _num_held(text: str) -> int:
    """Length of the tail that may be the beginning of a call: white space, then a beginning of the
    marker."""
    num_marker = 0
    for length in range(min(len(text), len(CALL_BEGIN) - 1), 0, -1):
        if text.endswith(CALL_BEGIN[:length]):
            num_marker = length
            break
    return len(text) - len(text[: len(text) - num_marker].rstrip())


def _read_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a complete call object; None if it is not a call of a known
    tool."""
    try:
        call = json.loads(text, strict=False)  # models do put raw line breaks into strings
        name = call.get("name")
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False)
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, AttributeError, RecursionError):
        return None
    if not written.isascii() and any("\ud800" <= char <= "\udfff" for char in written):
        written = json.dumps(arguments)  # half a surrogate pair has no UTF-8 form; its escape has
    return name, written


def parse_tool_calls(parser: ToolCallParser, text: str) -> tuple[str | None, list[ToolCall]]:
    """A whole text at once: (content, calls); content is None where there is nothing but calls."""
    deltas = [parser.push(text), parser.finish()]
    content = "".join(delta.content for delta in deltas)
    calls: list[ToolCall] = []
    for delta in (call for parsed in deltas for call in parsed.tool_calls):
        if delta.name is not None:
            calls.append(ToolCall(id=delta.id or "", name=delta.name, arguments=delta.arguments))
        else:
            last = calls[-1]
            calls[-1] = ToolCall(
                id=last.id, name=last.name, arguments=last.arguments + delta.arguments
            )
    return content if content or not calls else None, calls
