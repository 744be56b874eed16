"""Loading, unloading and rolling back adapters while the server runs.

An adapter is published only after the engine has read and placed it, so a request never meets one
that cannot be served. Loads come one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from adapters.confine import confine
from adapters.registry import AdapterRecord, Registry
from engine.api import AdapterRef, AdapterReply
from engine.errors import AdapterError, AdapterNotFound, EngineError
from engine.model_config import ModelSpec
from server.errors import ApiError
from server.metrics import Metrics

log = logging.getLogger("herd.adapters")
FINE_TUNED = "ft:"
"""How the names of fine-tuned models begin; other adapters may not."""


class LoadsAdapters(Protocol):
    """The part of EngineClient that adapters need."""

    async def load_adapter(
        self, ref: AdapterRef, pinned: bool = False, from_training: str | None = None
    ) -> AdapterReply: ...
    async def unload_adapter(self, ref: AdapterRef) -> None: ...


class Adapters:
    """The adapters of a running server: the registry's names, the engine's weights."""

    def __init__(
        self,
        spec: ModelSpec,
        engine: LoadsAdapters,
        metrics: Metrics,
        *,
        roots: Sequence[Path] = (),
        reserved_names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            spec: the base that adapters must fit.
            roots: folders from which adapters may be loaded at run time.
            reserved_names: the base model's own.
        """
        self.registry = Registry(spec, on_freed=self._forget)
        self._engine = engine
        self._metrics = metrics
        self._roots = tuple(roots)
        self._reserved_names = frozenset(reserved_names)
        self.fine_tuned: dict[str, Path] = {}
        """Models that this server has trained, and their checkpoints: name to folder. They are read
        when they are first used."""
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(
        self,
        name: str,
        path: str | None,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        expected_generation: int | None = None,
    ) -> AdapterRecord:
        """Load an adapter from one of the roots at a client's request.

        Args:
            path: None is the folder of that name; a fine-tuned model's name is its folder.
            expected_generation: go on only if this one is current; 0: only if the name is free.

        Raises:
            EngineError, ApiError: refused; the registry is as before.
        """
        if name.startswith(FINE_TUNED):
            raise AdapterError(
                f"Names that begin with {FINE_TUNED!r} are those of fine-tuned models, which are "
                f"loaded when they are used. Choose another name."
            )
        folder, roots = self.fine_tuned.get(path or name), None
        if folder is None:
            roots = self._roots
            folder = await asyncio.to_thread(confine, path or name, roots)
        async with self._lock:
            self._expect(name, expected_generation)
            return await self._publish(
                name, folder, load_inplace=load_inplace, pinned=pinned, roots=roots
            )

    async def load_at_start(self, name: str, folder: Path) -> AdapterRecord:
        """Load an adapter that the operator named; it may lie anywhere.

        Raises:
            EngineError: refused.
        """
        async with self._lock:
            return await self._publish(name, folder, load_inplace=False, pinned=False, roots=None)

    async def publish_trained(self, name: str, folder: Path) -> AdapterRecord:
        """Publish what training has just written; the engine takes the weights from memory.

        Raises:
            EngineError: it cannot be loaded.
        """
        self.fine_tuned[name] = folder
        async with self._lock:
            return await self._publish(
                name, folder, load_inplace=True, pinned=False, roots=None, from_training=str(folder)
            )

    async def wake(self, name: str) -> None:
        """Load a fine-tuned model that has not been used since the start; other names are left
        alone.

        Raises:
            EngineError: it cannot be loaded.
        """
        if name not in self.fine_tuned or name in self.registry.names():
            return
        async with self._lock:
            if name not in self.registry.names():
                folder = self.fine_tuned[name]
                await self._publish(name, folder, load_inplace=False, pinned=False, roots=None)

    async def withdraw(self, name: str) -> None:
        """Forget a fine-tuned model, loaded or not."""
        self.fine_tuned.pop(name, None)
        with contextlib.suppress(AdapterNotFound):
            await self.unload(name)

    async def unload(self, name: str) -> None:
        """Forget a name; requests that run finish on their generation.

        Raises:
            AdapterNotFound: no such adapter.
        """
        async with self._lock:
            self.registry.remove(name)
        self._metrics.adapter_generation.remove(self._metrics.model_name, name)
        log.info("adapter %s unloaded", name)

    async def rollback(self, name: str, generation: int | None) -> AdapterRecord:
        """Make an older generation current again, once the engine has it.

        Raises:
            EngineError: no such adapter or generation, or it cannot be loaded; then nothing
            changes.
        """
        async with self._lock:
            before = self.registry.resolve(name)
            record = self.registry.rollback(name, generation)
            try:
                await self._engine.load_adapter(record.ref, record.pinned)
            except EngineError:
                self.registry.rollback(name, before.ref.generation)
                raise
            if before.pinned and before.ref != record.ref:
                self._forget(before.ref)  # its pinned row; a later rollback loads it again
            self._book(record)
        log.info("adapter %s rolled back to generation %d", name, record.ref.generation)
        return record

    async def reload_all(self) -> None:
        """A new worker knows no adapter: give it the current generations."""
        for record in self.registry.records():
            try:
                await self._engine.load_adapter(record.ref, record.pinned)
            except EngineError as error:
                log.error("adapter %s could not be loaded again: %s", record.name, error)

    async def _publish(
        self,
        name: str,
        folder: Path,
        *,
        load_inplace: bool,
        pinned: bool,
        roots: Sequence[Path] | None,
        from_training: str | None = None,
    ) -> AdapterRecord:
        if name in self._reserved_names:
            error = AdapterError(
                f"An adapter cannot be called {name!r}: that is the base model's name. Choose "
                f"another, or give the base one with --served-model-name."
            )
            error.param = "lora_name"
            raise error
        before = self.registry.resolve(name) if name in self.registry.names() else None
        started = time.monotonic()
        prepared = await asyncio.to_thread(
            self.registry.prepare, name, folder, load_inplace=load_inplace, roots=roots
        )
        try:
            await self._engine.load_adapter(prepared.ref, pinned, from_training)
            record = self.registry.commit(prepared, pinned=pinned)
        except BaseException:
            self.registry.discard(prepared)
            raise
        if before is not None and before.pinned:
            self._forget(before.ref)
        load_s = time.monotonic() - started
        self._metrics.adapter_load.labels(self._metrics.model_name, name).observe(load_s)
        self._book(record)
        log.info("adapter %s generation %d loaded in %.2f s", name, record.ref.generation, load_s)
        return record

    def _expect(self, name: str, generation: int | None) -> None:
        if generation is None:
            return
        try:
            current = self.registry.resolve(name).ref.generation
        except AdapterNotFound:
            current = 0
        if current != generation:
            raise ApiError(
                409,
                f"Adapter {name!r} is at generation {current}, "
                f"expected_generation is {generation}.",
                code="generation_conflict",
                param="expected_generation",
            )

    def _book(self, record: AdapterRecord) -> None:
        gauge = self._metrics.adapter_generation.labels(self._metrics.model_name, record.name)
        gauge.set(record.ref.generation)

    def _forget(self, ref: AdapterRef) -> None:
        """Let the engine drop a generation, in the background: it waits for running requests."""
        task = asyncio.get_running_loop().create_task(self._unload(ref))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, ref: AdapterRef) -> None:
        try:
            await self._engine.unload_adapter(ref)
        except EngineError as error:  # the worker has gone and the weights with it
            log.debug("generation %d of %s was gone already: %s", ref.generation, ref.name, error)
