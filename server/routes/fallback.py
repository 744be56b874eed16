"""Unknown URLs below /v1: refused in OpenAI's shape, whatever is mounted at /."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import ApiError

router = APIRouter()


@router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
async def unknown(request: Request, path: str) -> Response:
    """404."""
    text = f"Unknown request URL: {request.method} /v1/{path[:200]}."
    raise ApiError(404, text, code="unknown_url")
