"""JSON Lines, or one JSON array, to records with their line numbers; streamed, with bounded memory.

A broken line of JSON Lines is a problem of its own and reading goes on. Behind a broken element of
an array nothing can be told apart, so reading ends there.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from server.datasets.problems import BadRecord, ProblemList

MAX_RECORD_BYTES = 16 * 2**20
"""Of one line, or of one element of an array."""
CHUNK_BYTES = 64 * 2**10
PROGRESS_EVERY = 200
"""Records between two calls of on_progress."""
Record = dict[str, Any]
_SPACE = re.compile(r"[ \t\r\n]*")

_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip", "Unpack it (gunzip)."),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "Unpack it (unzstd)."),
    (b"BZh", "compressed with bzip2", "Unpack it (bunzip2)."),
    (b"\xfd7zXZ\x00", "compressed with xz", "Unpack it (unxz)."),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "Unpack it, or export it as JSON Lines."),
    (b"PAR1", "a Parquet file", "Convert it: pandas' read_parquet(...).to_json(..., lines=True)."),
    (b"ARROW1", "an Arrow file", "Convert it: datasets' Dataset.to_json."),
    (b"SQLite format 3", "an SQLite database", "Export a table as JSON Lines."),
    (b"\xff\xfe", "UTF-16 text", "Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text", "Save it as UTF-8."),
)
_EXPECTED = "Expected one JSON object per line (JSON Lines), or one JSON array of objects."


def read_records(
    path: Path, problems: ProblemList, on_progress: Callable[[float], None] | None = None
) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of each record; what is no record goes to `problems`."""
    try:
        with path.open("rb") as file:
            num_bytes = max(os.fstat(file.fileno()).st_size, 1)
            if not _is_json(file, problems):
                return
            start = file.tell()
            is_array = _first_char(file) == b"["
            file.seek(start)
            records = _array(file, problems) if is_array else _lines(file, problems)
            for index, (line, value) in enumerate(records):
                if on_progress is not None and index % PROGRESS_EVERY == 0:
                    on_progress(min(file.tell() / num_bytes, 1.0))
                if isinstance(value, dict):
                    yield line, value
                else:
                    problems.add(f"expected a JSON object, got {_kind(value)}.", line)
    except OSError as error:
        problems.add(f"the file cannot be read: {error.strerror or error}.")


def _is_json(file: BinaryIO, problems: ProblemList) -> bool:
    """Say what a file is that can be no JSON; else stand behind the byte order mark, if any."""
    head = file.read(CHUNK_BYTES)
    for magic, what, remedy in _FOREIGN:
        if head.startswith(magic):
            problems.add(f"this is {what}. {_EXPECTED} {remedy}")
            return False
    file.seek(3 if head.startswith(codecs.BOM_UTF8) else 0)
    first = head.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0].strip()
    if not first.startswith((b"{", b"[")) and any(mark in first for mark in (b",", b"\t", b";")):
        shown = first[:60].decode("utf-8", "replace")
        problems.add(f"the first line, {shown!r}, looks like CSV. {_EXPECTED} Convert the file.")
        return False
    if first == b"{":
        problems.add(f"a record is spread over several lines. {_EXPECTED} Put it on one line.", 1)
        return False
    return True


def _first_char(file: BinaryIO) -> bytes:
    """The first byte that is no white space; b"" where there is none."""
    while chunk := file.read(CHUNK_BYTES):
        if stripped := chunk.lstrip():
            return stripped[:1]
    return b""


def _lines(file: BinaryIO, problems: ProblemList) -> Iterator[tuple[int, object]]:
    line = 0
    while raw := file.readline(MAX_RECORD_BYTES + 1):
        line += 1
        if len(raw) > MAX_RECORD_BYTES:
            problems.add(f"the line is longer than {MAX_RECORD_BYTES >> 20} MiB.", line)
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(CHUNK_BYTES)
            continue
        try:
            text = raw.decode("utf-8")
            if text.strip():
                yield line, _DECODER.decode(text.strip())
        except UnicodeDecodeError as error:
            problems.add(_not_utf8(error.start, raw), line)
        except (ValueError, RecursionError) as error:
            problems.add(_not_json(error), line)


@dataclass(slots=True)
class _Window:
    """The part of a file that is being parsed; it holds one element of an array at least."""

    file: BinaryIO
    text: str = ""
    position: int = 0
    line: int = 1
    """Of the position."""
    is_end: bool = False
    """The file has no more to give."""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=codecs.getincrementaldecoder("utf-8")
    )

    def read_more(self) -> None:
        num_left = len(self.text) - self.position
        chunk = self.file.read(
            max(CHUNK_BYTES, num_left)
        )  # a long element: twice as much each time
        self.is_end = not chunk
        self.text = self.text[self.position :] + self._decoder.decode(chunk, final=self.is_end)
        self.position = 0

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_char(self) -> str:
        """The next one that is no white space, not yet consumed; "" at the end."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None
            self.advance(space.end())
            if self.position < len(self.text) or self.is_end:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def take(self) -> str:
        """The next character, consumed."""
        char = self.next_char()
        self.advance(self.position + len(char))
        return char

    def value(self) -> object:
        """One JSON value.

        Raises:
            ValueError, RecursionError: there is none.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                break
            except json.JSONDecodeError as error:
                if self.is_end or len(self.text) - self.position > MAX_RECORD_BYTES:
                    self.advance(error.pos)
                    raise BadRecord(f"not valid JSON: {error.msg}.") from error
            self.read_more()  # the element may go on
        self.advance(end)
        return value


def _array(file: BinaryIO, problems: ProblemList) -> Iterator[tuple[int, object]]:
    window = _Window(file)
    try:
        window.take()  # "["
        separator = window.take() if window.next_char() == "]" else ","
        while separator == ",":
            window.next_char()
            line = window.line
            yield line, window.value()
            separator = window.take()
        if separator != "]":
            problems.add(
                f"expected ',' or ']' behind an element, got {separator!r}. The rest was not read.",
                window.line,
            )
        elif window.next_char():
            problems.add(f"there is more behind the array's end. {_EXPECTED}", window.line)
    except UnicodeDecodeError as error:
        problems.add(f"{_not_utf8(error.start, error.object)} The rest was not read.", window.line)
    except (ValueError, RecursionError) as error:
        problems.add(f"{_not_json(error)} The rest was not read.", window.line)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRecord(f"the field {twice[:80]!r} is given twice. Remove one.")
    return value


def _no_constant(name: str) -> None:
    raise BadRecord(f"{name} is no JSON. Use a number or null.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _not_json(error: Exception) -> str:
    if isinstance(error, BadRecord):
        return str(error)
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply."
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}."
    return f"not valid JSON: {error}."


def _not_utf8(start: int, raw: bytes) -> str:
    return f"not valid UTF-8: byte 0x{raw[start]:02x} at {start + 1}. Save the file as UTF-8."


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")
