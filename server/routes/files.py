"""/v1/files: upload, list, retrieve, read, delete."""

from __future__ import annotations

import contextlib
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import FileResponse, Response

from server.auth import require_admin
from server.errors import ApiError, bad_request, json_response
from server.files import FileRecord
from server.pages import list_response, unknown_after
from server.state import state_of
from server.uploads import Form, receive_form

router = APIRouter()
ADMIN = [Depends(require_admin)]
PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 24 * 3600


@router.post("/v1/files", dependencies=ADMIN)
async def create_file(request: Request) -> Response:
    """Upload a file; it is streamed to the disk."""
    state = state_of(request)
    file_id = state.files.new_id()
    unfinished = state.files.unfinished_path(file_id)
    try:
        form = await receive_form(request, unfinished)
        purpose, expires_after_s = _check(form)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
    record = await state.files.add(file_id, form.filename or "", purpose, expires_after_s)
    return json_response(record.to_dict())


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """All files, newest first."""
    try:
        records, has_more = await state_of(request).files.page(
            purpose=purpose, after=after, limit=limit, newest_first=order == "desc"
        )
    except LookupError:
        raise unknown_after(after) from None
    return list_response([record.to_dict() for record in records], has_more)


@router.get("/v1/files/{file_id}")
async def retrieve_file(request: Request, file_id: str) -> Response:
    """One file's card."""
    return json_response((await state_of(request).files.get(file_id)).to_dict())


@router.get("/v1/files/{file_id}/content")
async def read_file(request: Request, file_id: str) -> Response:
    """A file's bytes."""
    state = state_of(request)
    record = await state.files.get(file_id)
    path = state.files.path(record.id)
    if not path.is_file():
        raise ApiError(404, f"The bytes of {record.id} are gone.", code="file_not_found")
    return FileResponse(path, media_type=_media_type(record), filename=record.filename)


@router.delete("/v1/files/{file_id}", dependencies=ADMIN)
async def delete_file(request: Request, file_id: str) -> Response:
    """Forget a file. Jobs that have read it go on."""
    await state_of(request).files.delete(file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def _check(form: Form) -> tuple[str, int | None]:
    """Purpose, and seconds until the file expires.

    Raises:
        ApiError: 400.
    """
    fields = dict(form.fields)
    if form.filename is None:
        raise bad_request("Missing required parameter: 'file'", "file", _MISSING)
    purpose = fields.pop("purpose", None)
    if purpose is None:
        raise bad_request("Missing required parameter: 'purpose'", "purpose", _MISSING)
    if purpose not in PURPOSES:
        allowed = ", ".join(PURPOSES)
        text = f"purpose: expected one of {allowed}, got {purpose[:80]!r}"
        raise bad_request(text, "purpose")
    anchor, seconds = fields.pop(ANCHOR, None), fields.pop(SECONDS, None)
    if fields:
        name = next(iter(fields))[:80]
        raise bad_request(f"Unknown parameter: '{name}'. Remove it", name, "unknown_parameter")
    if anchor is None and seconds is None:
        return purpose, None
    if anchor != "created_at":
        text = f"expires_after.anchor: expected 'created_at', got {(anchor or '')[:80]!r}"
        raise bad_request(text, "expires_after.anchor")
    number = int(seconds) if seconds and seconds.isdecimal() and len(seconds) < 10 else 0
    if not MIN_EXPIRY_S <= number <= MAX_EXPIRY_S:
        found = repr((seconds or "")[:80])
        text = f"expires_after.seconds: expected {MIN_EXPIRY_S} to {MAX_EXPIRY_S}, got {found}"
        raise bad_request(text, "expires_after.seconds")
    return purpose, number


def _media_type(record: FileRecord) -> str:
    types = {"jsonl": "application/jsonl", "json": "application/json", "csv": "text/csv"}
    return types.get(record.filename.rpartition(".")[2].lower(), "application/octet-stream")


_MISSING = "missing_required_parameter"
