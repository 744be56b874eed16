"""The HTTP app: middleware, routes, error shape. serve.py builds the state and may mount the
page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import Depends, FastAPI, Request
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.auth import ForeignPageGuard, require_key
from server.limits import BodyLimit
from server.metrics import Metrics, adapter_metrics, engine_metrics
from server.routes import (
    adapters,
    chat,
    completions,
    fallback,
    feedback,
    files,
    fine_tuning,
    health,
    models,
    score,
    tokenize,
)
from server.state import ServerState
from server.streaming import ClientGone

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for the log; nobody is there to read it."""


def create_app(state: ServerState, *, lifespan: Lifespan | None = None) -> FastAPI:
    """Build the app over a state.

    Args:
        state: found by the routes as app.state.herd.
        lifespan: run around the app's life: starts and stops the engine.
    """
    app = FastAPI(
        title="Herd",
        version=state.version,
        docs_url=None,  # those pages load scripts from another host
        redoc_url=None,
        openapi_url=None,  # bodies are checked outside FastAPI's sight; docs/ describes them
        root_path=state.config.root_path,
        dependencies=[Depends(require_key)],
        lifespan=lifespan or _no_lifespan,
    )
    app.state.herd = state
    # fallback is last: it takes what no other route does.
    for module in (
        chat, completions, models, adapters, health, tokenize, score, files, fine_tuning,
        feedback, fallback,
    ):  # fmt: skip
        app.include_router(module.router)
    errors.install(app)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    state.metrics.watch(EngineCollector(state))
    # Added last is outermost.
    app.add_middleware(
        BodyLimit,
        max_bytes=state.config.max_request_bytes,
        max_file_bytes=state.config.max_file_bytes,
    )
    if state.config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(state.config.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Herd-Adapter-Generation", "Retry-After"],
        )
    app.add_middleware(ForeignPageGuard, config=state.config)
    app.add_middleware(CountAnswers, metrics=state.metrics)
    return app


@asynccontextmanager
async def _no_lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


class EngineCollector(Collector):
    """Reads the engine's own numbers when /metrics is asked for."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        state, engine = self._state, self._state.engine
        name = state.metrics.model_name
        yield from engine_metrics(name, engine.stats, engine.info, engine.num_restarts)
        yield from adapter_metrics(name, state.registry.records(), engine.stats)


class CountAnswers:
    """ASGI middleware: counts answers by route (its pattern, not the path) and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        def count(status: int) -> None:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" else "other"
            self._metrics.http.labels(method, route, str(status)).inc()

        has_begun = False

        async def counted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not has_begun:
                count(500)  # which Starlette sends, further out
            raise
