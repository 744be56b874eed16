"""GET /health, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import error_response, json_response
from server.metrics import CONTENT_TYPE
from server.state import state_of

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """200 when requests can be taken; 503 with the reason while loading, restarting or draining.
    Needs no key."""
    error = state_of(request).unavailable()
    if error is not None:
        return error_response(
            error
        )  # not raised: whoever waits for us asks often, the log is spared
    return json_response({"status": "ok"})


@router.get("/version")
async def version(request: Request) -> Response:
    """Herd's version."""
    return json_response({"version": state_of(request).version})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    return Response(state_of(request).metrics.text(), media_type=CONTENT_TYPE)
