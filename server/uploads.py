"""Reading a multipart/form-data body: fields into memory, the one file straight to the disk."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from server.database import StorageFull
from server.errors import ApiError, bad_request

MAX_FIELD_BYTES = 64 * 1024
MAX_FIELDS = 32
WRITE_BYTES = 1024 * 1024
FILE_FIELD = "file"


@dataclass(slots=True)
class Form:
    """What a body held."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None: there was no file."""
    num_bytes: int = 0
    """Of the file."""


async def receive_form(request: Request, destination: Path) -> Form:
    """Read a form; its file is written to `destination`, which the caller removes after an error.

    Raises:
        ApiError: 400, this is no form, or one with fields that make no sense.
        StorageFull: no room for the file.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad_request(
            "Expected a body of type multipart/form-data with the fields 'file' and 'purpose'.",
            code="invalid_form",
        )
    try:
        with destination.open("xb") as file:
            reader = _FormReader()
            parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
            async for chunk in request.stream():
                parser.write(chunk)
                if len(reader.pending) >= WRITE_BYTES:
                    await asyncio.to_thread(_write, file, reader.take())
            parser.finalize()
            await asyncio.to_thread(_write, file, reader.take())
    except FormParserError as error:
        raise bad_request(f"The form cannot be read: {error}.", code="invalid_form") from error
    except OSError as error:
        raise disk_error(error, destination) from error
    if not reader.is_complete:
        raise bad_request("The form ends before its closing boundary.", code="invalid_form")
    return reader.form


def disk_error(error: OSError, path: Path) -> StorageFull | ApiError:
    """What a client learns when a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"The disk of {path.parent} is full. Delete files, or make room there.")
    reason = error.strerror or str(error)
    text = f"Files cannot be written to {path.parent}: {reason}. See --data-dir."
    return ApiError(503, text, code="storage_unavailable")


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()  # a full disk shows here, not when the file is closed


class _FormReader:
    """The parser's callbacks: collects fields and counts the file's bytes."""

    def __init__(self) -> None:
        self.form = Form()
        self.pending = bytearray()
        """Of the file, not written yet."""
        self.is_complete = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._value = bytearray()

    def callbacks(self) -> dict[str, object]:
        names = (
            "on_part_begin", "on_part_data", "on_part_end", "on_header_field", "on_header_value",
            "on_header_end", "on_headers_finished", "on_end",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def take(self) -> bytes:
        data = bytes(self.pending)
        self.pending.clear()
        return data

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._value = bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = b"filename" in options
        if self._is_file:
            if self._name != FILE_FIELD or self.form.filename is not None:
                text = f"expected one file, in the field 'file', found one in {self._name[:80]!r}"
                raise bad_request(text, FILE_FIELD)
            self.form.filename = options[b"filename"].decode("utf-8", "replace")
        elif not self._name or self._name in self.form.fields:
            raise bad_request(f"The field {self._name[:80]!r} is empty or comes twice.")
        elif len(self.form.fields) >= MAX_FIELDS:
            raise bad_request(f"The form has more than {MAX_FIELDS} fields.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
            self.form.num_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise bad_request(f"{self._name[:80]}: more than {MAX_FIELD_BYTES} bytes", self._name)

    def on_part_end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.is_complete = True
