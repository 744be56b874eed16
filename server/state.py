"""What the routes share: the engine's client, the adapters, the tokenizer, the counters of what
runs.

One ServerState per app, built by serve.py and found through `state_of(request)`. Touched on the
event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from adapters.registry import AdapterRecord, Registry
from engine.api import AdapterRef, AdapterReply, EngineInfo, EngineStats, LoadProgress
from engine.errors import AdapterNotFound
from server.adapters import Adapters
from server.chat_template import ChatTemplate
from server.config import ServerConfig
from server.errors import ApiError
from server.feedback import Feedback
from server.files import Files
from server.generation import Generates
from server.jobs import Jobs
from server.limits import body_of
from server.metrics import Metrics
from server.tokenizer import Tokenizer

B = TypeVar("B", bound=BaseModel)


class Engine(Generates, Protocol):
    """What the routes need of server/engine_client.EngineClient."""

    @property
    def state(self) -> str: ...
    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def progress(self) -> LoadProgress | None: ...
    @property
    def num_restarts(self) -> int: ...
    async def load_adapter(
        self, ref: AdapterRef, pinned: bool = False, from_training: str | None = None
    ) -> AdapterReply: ...
    async def unload_adapter(self, ref: AdapterRef) -> None: ...
    async def stop(self, timeout_s: float) -> None: ...


@dataclass(slots=True, kw_only=True)
class ServerState:
    config: ServerConfig
    engine: Engine
    registry: Registry
    adapters: Adapters
    tokenizer: Tokenizer
    model_names: tuple[str, ...]
    """The base model's; the first is shown."""
    base_path: str
    """Where the base model comes from, for /v1/models."""
    max_num_seqs: int
    """Sequences that run at once; what is admitted beyond them waits."""
    metrics: Metrics
    files: Files
    feedback: Feedback
    jobs: Jobs
    chat_template: ChatTemplate | None = None
    """--chat-template."""
    version: str = "0.1.0"
    created_at: int = field(default_factory=lambda: int(time.time()))
    num_sequences: int = 0
    """Admitted and not ended."""
    is_draining: bool = False

    def info(self) -> EngineInfo:
        """Facts about the engine.

        Raises:
            ApiError: 503, it is not ready.
        """
        error = self.unavailable()
        if error is not None:
            raise error
        assert self.engine.info is not None
        return self.engine.info

    def unavailable(self) -> ApiError | None:
        """Why no request can be taken now."""
        if self.is_draining:
            text = "The server is shutting down; running requests are being finished."
            return ApiError(503, text, code="shutting_down")
        if self.engine.state == "ready":
            return None
        if self.engine.state == "restarting":
            text = "A new engine worker is being started; try again in a few seconds."
            return ApiError(503, text, code="engine_restarting")
        if self.engine.state == "loading":
            progress = self.engine.progress
            stage = f" ({progress.stage} {progress.done}/{progress.total})" if progress else ""
            return ApiError(503, f"The model is being loaded{stage}.", code="engine_loading")
        return ApiError(
            503, "The engine is not running; see the server's log.", code="engine_stopped"
        )

    def find(self, model: str) -> AdapterRecord | None:
        """The adapter of that name, None for the base model.

        Raises:
            ApiError: 404, no such model; never the base instead.
        """
        if model in self.model_names:
            return None
        try:
            return self.registry.resolve(model)
        except AdapterNotFound:
            known = ", ".join((*self.model_names, *self.registry.names()))
            text = f"The model '{model[:200]}' does not exist. There are: {known}."
            raise ApiError(404, text, code="model_not_found", param="model") from None

    def lease(self, model: str, num_sequences: int, lora_scale: float | None = None) -> Lease:
        """Admit a request and hold its adapter's current generation.

        Raises:
            ApiError: 404 unknown model, 400 a scale without an adapter, 503 not ready or queue
                full.
        """
        adapter = self.find(model)
        if adapter is None and lora_scale is not None:
            text = f"lora_scale: '{model}' is the base model, there is no adapter to scale"
            raise ApiError(400, text, code="invalid_value", param="lora_scale")
        self.info()
        limit = self.max_num_seqs + self.config.max_queued_requests
        if self.num_sequences and self.num_sequences + num_sequences > limit:
            text = (
                f"The queue is full: {self.num_sequences} sequences run or wait, this request has "
                f"{num_sequences}, the limit is {limit}. Try again soon."
            )
            raise ApiError(503, text, code="queue_full")
        ref = self.registry.acquire(adapter.name) if adapter is not None else None
        self.num_sequences += num_sequences
        return Lease(self, num_sequences, adapter, ref)

    def fingerprint(self, ref: AdapterRef | None) -> str:
        """system_fingerprint: the base's hash, and the adapter's generation."""
        info = self.engine.info
        base = f"fp_{info.base_fingerprint[:12]}" if info is not None else "fp_unknown"
        return base if ref is None else f"{base}_{ref.name}_g{ref.generation}"

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and let those that run finish; after the time they end with an
        error.

        Returns:
            Whether all had finished.
        """
        self.is_draining = True
        deadline = time.monotonic() + timeout_s
        while self.num_sequences and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        has_finished = self.num_sequences == 0
        if not has_finished:
            await self.engine.stop(0.0)
        return has_finished


@dataclass(slots=True)
class Lease:
    """One request's place and its adapter's generation, given back exactly once."""

    state: ServerState
    num_sequences: int
    adapter: AdapterRecord | None
    ref: AdapterRef | None
    is_released: bool = False

    def release(self) -> None:
        if self.is_released:
            return
        self.is_released = True
        self.state.num_sequences -= self.num_sequences
        if self.ref is not None:
            self.state.registry.release(self.ref)

    def headers(self) -> dict[str, str]:
        """Which generation answers."""
        return {"X-Herd-Adapter-Generation": str(self.ref.generation)} if self.ref else {}


def awake_body_of(model: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency as limits.body_of; fine-tuned models that the body names are loaded as well,
    where no request has used them since the start."""
    read = body_of(model)

    async def read_and_wake(request: Request) -> B:
        body = await read(request)
        for param in ("model", "reward_adapter"):
            name = getattr(body, param, None)
            if name is not None:
                await state_of(request).adapters.wake(name)
        return body

    return read_and_wake


def state_of(request: Request) -> ServerState:
    state = request.app.state.herd
    assert isinstance(state, ServerState)
    return state


def model_names(config: ServerConfig, base: str | Path) -> tuple[str, ...]:
    """What the base model is called: --served-model-name, else the last part of its name."""
    return config.served_model_name or (Path(base).name or str(base),)
