"""Errors as HTTP answers in OpenAI's shape: {"error": {message, type, param, code}}, the code
always a string.

One table maps the engine's error codes to statuses. Anything unforeseen is a 500 that says
nothing about the inside; the traceback goes to the log.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.api import ErrorInfo
from engine.errors import EngineError

log = logging.getLogger("herd.server")

STATUS = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "invalid_grammar": 400,
    "no_token_left": 400,
    "invalid_adapter": 400,
    "invalid_checkpoint": 400,
    "model_not_found": 404,
    "not_enough_memory": 503,
    "engine_restarting": 503,
    "database_unavailable": 503,
    "storage_full": 507,
}
RETRY_AFTER_S = {
    "queue_full": 1, "engine_restarting": 5, "engine_loading": 5, "shutting_down": 30,
    "database_unavailable": 5,
}  # fmt: skip


class ApiError(Exception):
    """An answer that refuses the request.

    Args:
        status: HTTP status.
        message: for people: what was found, what is allowed, what to do.
        code: for machines, stable.
        param: the request's parameter at fault, where there is one.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def from_engine(error: EngineError | ErrorInfo) -> ApiError:
    """The engine's error as an answer; a code that is not in the table is the server's fault."""
    info = error.info() if isinstance(error, EngineError) else error
    return ApiError(STATUS.get(info.code, 500), info.message, code=info.code, param=info.param)


def internal_error() -> ApiError:
    """All that a client learns of a fault of ours."""
    text = "Internal error; the server's log has the details."
    return ApiError(500, text, code="internal_error")


def error_type(status: int) -> str:
    """OpenAI's `type`, which follows from the status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    if status == 503:
        return "service_unavailable"
    return "invalid_request_error" if status < 500 else "server_error"


def error_body(error: ApiError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error_type(error.status),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> Response:
    headers = {}
    if error.code in RETRY_AFTER_S:
        headers["Retry-After"] = str(RETRY_AFTER_S[error.code])
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 413:
        headers["Connection"] = "close"  # the rest of the body is read for a while, then cut off
    return json_response(error_body(error), error.status, headers)


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON that any client can read: no NaN, and lone surrogates (which UTF-8 has no bytes for)
    escaped."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    content = text.encode("utf-8", "backslashreplace")
    return Response(content, status, headers, media_type="application/json")


def from_validation(error: ValidationError) -> ApiError:
    """The first problem decides param and code; the message lists the first five."""
    problems = _deepest(error.errors(include_url=False, include_context=False, include_input=True))
    texts = list(dict.fromkeys(map(_describe, problems)))  # arms of a union complain alike
    shown = "; ".join(texts[:5])
    if len(texts) > 5:
        shown += f"; and {len(texts) - 5} more"
    first = problems[0]
    codes = {
        "extra_forbidden": "unknown_parameter",
        "missing": "missing_required_parameter",
        "json_invalid": "invalid_json",
        "unsupported_parameter": "unsupported_parameter",
        "unsupported_content": "unsupported_content",
    }
    param = _path(first["loc"])
    if first["type"] == "value_error" and (named := _NAMED.match(first["msg"])):
        param += f".{named[1]}" if param else named[1]
    return bad_request(shown, param or None, codes.get(first["type"], "invalid_value"))


# A check over several parameters begins its message with the one at fault.
_NAMED = re.compile(r"Value error, ([a-z_0-9]+): ")


def _deepest(problems: list[Any]) -> list[Any]:
    """Of a union's complaints keep those of the arm that got furthest: they name what is wrong."""
    paths = [_path(problem["loc"]) for problem in problems]
    return [
        problem
        for path, problem in zip(paths, problems, strict=True)
        if not any(other != path and other.startswith((f"{path}[", f"{path}.")) for other in paths)
    ]


def _describe(problem: Any) -> str:
    path = _path(problem["loc"])
    kind, text = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        return (
            f"Unknown parameter: '{path}'. Remove it, or see the documentation for those supported"
        )
    if kind == "missing":
        return f"Missing required parameter: '{path}'"
    if kind == "json_invalid":
        return f"The body is not valid JSON: {text.removeprefix('Invalid JSON: ')}"
    if kind == "value_error":
        text = text.removeprefix("Value error, ")
    found = problem.get("input")
    shown = f", got {found!r}" if isinstance(found, int | float | bool | str | None) else ""
    if len(shown) > 80 or kind in ("unsupported_parameter", "unsupported_content", "value_error"):
        shown = ""
    return f"{path}: {text}{shown}" if path else text + shown


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content") -> "messages[0].content"; names of union arms are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not part[0].isupper() and part not in _UNION_ARMS:
            path += f".{part}" if path else part
    return path


_UNION_ARMS = {"str", "int", "float", "bool", "none", "dict", "list"}


def install(app: FastAPI) -> None:
    """Every error of the app, known or not, answers in the one shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        log.info(
            "%s %s: %d %s: %s",
            request.method,
            request.url.path,
            error.status,
            error.code,
            " ".join(error.message.split()),  # a line an event, whatever the client sent
        )
        return error_response(error)

    async def engine_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineError)
        return await api_error(request, from_engine(error))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, detail, code=code))

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        path = _path(first["loc"][1:])  # the first part is "query" or "path"
        return await api_error(request, bad_request(f"{path}: {first['msg']}", path))

    async def unforeseen(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(internal_error())

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(Exception, unforeseen)
