"""Adapters on their way from disk to the pool: one thread that reads, and a cache in host memory.

The thread reads, checks and packs; it touches none of the books kept here, which belong to the
engine's thread. What it has finished is taken over in finished(), once per step.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from engine.api import AdapterRef
from engine.config import LoraConfig
from engine.errors import AdapterError
from engine.lora import LoraWeights
from engine.lora_placement import BaseModel, PackedAdapter, pack_adapter


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter in host memory, ready to be placed."""

    packed: PackedAdapter
    load_s: float
    """Seconds that reading, checking and packing took."""


class LoraLoader:
    """Reads adapters off the step and keeps the most recently used ones."""

    def __init__(
        self,
        config: LoraConfig,
        model: BaseModel,
        load: Callable[[AdapterRef], LoraWeights],
        *,
        fingerprint: str | None,
        dtype: torch.dtype,
        pin_memory: bool,
    ) -> None:
        """
        Args:
            config: max_cpu_loras and max_lora_rank are used here.
            model: the base.
            load: reads one adapter from disk; raises AdapterError.
            fingerprint: the base's; adapters that name another are refused. None: not checked.
            dtype: of the low-rank matrices.
            pin_memory: page-lock what is kept.
        """
        self._config = config
        self._model = model
        self._load = load
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-loader")
        self._loading: dict[AdapterRef, Future[LoadedAdapter]] = {}
        self._cache: OrderedDict[AdapterRef, LoadedAdapter] = OrderedDict()  # oldest use first
        self.failures: dict[AdapterRef, AdapterError] = {}
        """Why an adapter could not be loaded; kept until it is forgotten or tried anew."""
        self.num_loads = 0
        self.load_s = 0.0

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    @property
    def has_room(self) -> bool:
        """Whether one more can be loaded without pushing another out of the cache."""
        return len(self._cache) + len(self._loading) < self._config.max_cpu_loras

    def start(self, ref: AdapterRef) -> None:
        """Begin to load an adapter, unless it is there or on its way."""
        if ref not in self._loading and ref not in self._cache:
            self._loading[ref] = self._thread.submit(self._read, ref)

    def finished(self) -> Iterator[AdapterRef]:
        """Take over, one by one, the adapters whose load has ended, in get() or in failures.

        Taking over the next may push the last one out of the cache: use each as it comes.
        """
        for ref, future in list(self._loading.items()):
            if future.done():
                del self._loading[ref]
                self._take_over(ref, future)
                yield ref

    def get(self, ref: AdapterRef) -> LoadedAdapter | None:
        """An adapter in host memory, None where it is not; this counts as a use."""
        loaded = self._cache.get(ref)
        if loaded is not None:
            self._cache.move_to_end(ref)
        return loaded

    def forget(self, ref: AdapterRef) -> None:
        """Drop an adapter, its failure, or its load."""
        self.failures.pop(ref, None)
        self._cache.pop(ref, None)
        future = self._loading.pop(ref, None)
        if future is not None:
            future.cancel()

    def close(self) -> None:
        """Stop the thread once it has finished what it is reading."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not agree."""
        assert len(self._cache) <= self._config.max_cpu_loras, "more cached than --max-cpu-loras"
        assert not self._cache.keys() & self._loading.keys(), "a cached adapter is being loaded"
        assert not self._cache.keys() & self.failures.keys(), "a failed adapter is cached"

    def _take_over(self, ref: AdapterRef, future: Future[LoadedAdapter]) -> None:
        try:
            loaded = future.result()
        except AdapterError as error:
            self.failures[ref] = error
        # The boundary to the loader thread: whatever it hit is this adapter's failure.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.failures[ref] = AdapterError(f"Adapter {ref.name!r} could not be loaded: {reason}")
        else:
            self.num_loads += 1
            self.load_s += loaded.load_s
            self._cache[ref] = loaded
            while len(self._cache) > self._config.max_cpu_loras:
                self._cache.popitem(last=False)

    def _read(self, ref: AdapterRef) -> LoadedAdapter:
        """Read, check and pack one adapter, in the loader thread."""
        started = time.perf_counter()
        weights = self._load(ref)
        self._check(ref, weights)
        packed = pack_adapter(weights, self._model, self._dtype, pin_memory=self._pin_memory)
        return LoadedAdapter(packed, time.perf_counter() - started)

    def _check(self, ref: AdapterRef, weights: LoraWeights) -> None:
        found = weights.base_fingerprint
        if found is not None and self._fingerprint is not None and found != self._fingerprint:
            raise AdapterError(
                f"Adapter {ref.name!r} was trained on another base: it names fingerprint {found}, "
                f"this base has {self._fingerprint}. Serve it on the base it was trained on."
            )
        rank = max((module.a.shape[0] for module in weights.modules.values()), default=0)
        limit = self._config.max_lora_rank
        if limit is not None and rank > limit:
            raise AdapterError(
                f"Adapter {ref.name!r} has rank {rank}, --max-lora-rank is {limit}. Raise it or "
                f"leave the adapter out."
            )
