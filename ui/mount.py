"""Put a Gradio page into the API's FastAPI app at "/", with no more of Gradio than it uses.

Gradio's own mount answers every path that the API does not know, so that a mistyped API route would
get Gradio's reply instead of the API's error; and it brings uploads, file serving and a proxy that
no API key guards. Here each path that the page needs is a route, all others stay the API's, and a
Content-Security-Policy keeps the browser from calling any other host, whatever an answer contains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

READ_PATHS = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/assets/{file:path}",
    "/static/{file:path}",
    "/gradio_api/app_id",
    "/gradio_api/queue/data",
    "/gradio_api/heartbeat/{session}",
)
WRITE_PATHS = ("/gradio_api/queue/join", "/gradio_api/cancel")

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page starts from inline scripts and builds its event functions from text.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)


def mount_blocks(app: FastAPI, blocks: gr.Blocks, *, favicon: Path, **look: Any) -> None:
    """Serve `blocks` at "/" of `app`; to be called before the app starts: it extends its lifespan.

    Args:
        app: the API; its own routes go first, whether they are added before or after.
        blocks: the page.
        favicon: an image file.
        look: theme, css_paths, head_paths and the like, as `gr.mount_gradio_app` takes them.
    """
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        favicon_path=str(favicon),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        **look,
    )
    catch_all = app.router.routes.pop()
    assert isinstance(catch_all, Mount)
    page = _Guarded(catch_all.app)
    for paths, methods in ((READ_PATHS, ["GET"]), (WRITE_PATHS, ["POST"])):
        for path in paths:
            app.router.routes.append(
                Route(path, page, methods=methods, name="page", include_in_schema=False)
            )


class _Guarded:
    """An ASGI app that gets no file references and whose replies carry the security headers."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = CONTENT_SECURITY_POLICY
                headers["referrer-policy"] = "no-referrer"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        if scope["method"] != "POST":
            await self._inner(scope, receive, send_guarded)
            return
        body = await Request(scope, receive).body()
        try:
            json.loads(body, object_hook=_refuse_files)
        except (ValueError, RecursionError) as error:
            await PlainTextResponse(f"Refused: {error}", 400)(scope, receive, send_guarded)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self._inner(scope, receive_again, send_guarded)


def _refuse_files(value: dict[str, Any]) -> dict[str, Any]:
    """Gradio copies or downloads whatever file a visitor's data names; this page has no files."""
    if "_type" in value:
        raise ValueError(f"this page takes no {value['_type']}")
    return value
