"""The pool of adapters on the device: a fixed number of rows, and which adapter has which.

A row is a resource like a KV block: a sequence acquires its adapter's row before it runs and releases it when it
ends or is preempted. Rows hold exactly what an adapter needs: no padding to a largest rank. Adapters come from disk
through one loader thread, which reads, checks and packs them; the step only ever pays for the copy to the device.
Packed adapters stay in host memory, the least recently used give way, as they do in the rows.

Everything here but the loader's work runs on the engine's thread, so there is no lock.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.api import AdapterRef, ErrorInfo
from engine.config import LoraConfig
from engine.errors import AdapterError, EngineError, NotEnoughMemory
from engine.lora import SCORE_HEAD, LayerPlan, LoraBatch, LoraWeights, PlacedAdapter
from engine.lora_placement import PackedAdapter, pack_adapter

if TYPE_CHECKING:
    from engine.model import CausalLM


class PreloadDone(Protocol):
    """Called once when a preload has ended, on the engine's thread."""

    def __call__(self, *, error: ErrorInfo | None, load_s: float, num_bytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Loaded:
    packed: PackedAdapter
    load_s: float


@dataclass(slots=True)
class _Row:
    """What one pool row holds."""

    ref: AdapterRef
    has_score_head: bool
    num_bytes: int


class LoraPool:
    """Which adapters are on the device, who uses them, and who gives way."""

    def __init__(
        self,
        config: LoraConfig,
        model: CausalLM,
        load: Callable[[AdapterRef], LoraWeights],
        *,
        fingerprint: str | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            config:      number of rows, largest rank, adapters kept in host memory.
            model:       the base, for DoRA's norms, biases and the widths of its layers.
            load:        reads and checks an adapter; runs in the loader thread; raises AdapterError.
            fingerprint: the base's; adapters that name another are refused. None: not checked.
            device:      where the rows are.
            dtype:       of the low-rank matrices in the rows; the model's, as a rule.
        """
        self._config = config
        self._model = model
        self._load = load
        self._fingerprint = fingerprint
        self._device = device
        self._dtype = dtype
        self._widths = {
            path: out_features for path, (out_features, _) in model.spec.linear_shapes().items()
        }
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-loader")
        self._loading: dict[AdapterRef, Future[_Loaded]] = {}
        self._waiting: dict[AdapterRef, list[PreloadDone]] = {}
        self._failures: dict[AdapterRef, AdapterError] = {}
        self._host: OrderedDict[AdapterRef, _Loaded] = OrderedDict()  # least recently used first
        self._rows: list[_Row | None] = [None] * config.max_loras
        self._placed: list[PlacedAdapter | None] = [None] * config.max_loras
        self._row_of: OrderedDict[AdapterRef, int] = OrderedDict()  # least recently used first
        self._num_users: Counter[AdapterRef] = Counter()
        self._pinned: set[AdapterRef] = set()
        self._unloading: set[AdapterRef] = set()
        self._plans: dict[tuple[str, ...], LayerPlan] = {}
        self.num_loads = 0
        """Adapters read from disk."""
        self.num_evictions = 0
        """Adapters that gave up their row to another."""
        self.load_s = 0.0
        """Seconds spent reading and placing, in total."""

    # What sequences ask for.

    def acquire(self, ref: AdapterRef) -> int | None:
        """The adapter's pool row, counted as in use until release; None when it is not ready or no row is free.

        None starts loading where needed; ask again in a later step.

        Raises:
            AdapterError: the adapter could not be loaded; the same error until it is unloaded or loaded anew.
        """
        if ref in self._failures:
            raise self._failures[ref]
        row = self._row_of.get(ref)
        if row is None:
            row = self._place(ref)
        if row is None:
            # With every row in use and host memory full, loading would only push out another that waits.
            if (
                len(self._host) + len(self._loading) < self._config.max_cpu_loras
                or self._has_free_row()
            ):
                self._start_loading(ref)
            return None
        self._num_users[ref] += 1
        self._row_of.move_to_end(ref)
        return row

    def release(self, ref: AdapterRef) -> None:
        """One user less; the adapter stays in its row until another needs the room or it is unloaded."""
        assert self._num_users[ref] > 0, f"{ref} is released more often than acquired"
        self._num_users[ref] -= 1
        if self._num_users[ref] == 0:
            del self._num_users[ref]
            if ref in self._unloading:
                self._forget(ref)

    def batch(self, rows: Sequence[int], scales: Sequence[float]) -> LoraBatch | None:
        """The adapters of a step: a pool row (-1: base) and a lora_scale per token; None when all are the base's."""
        # A scale of zero is the base, to the bit.
        rows = [row if scale != 0.0 else -1 for row, scale in zip(rows, scales, strict=True)]
        if all(row < 0 for row in rows):
            return None
        lora_indices = torch.tensor(rows, dtype=torch.int32).to(self._device, non_blocking=True)
        lora_scales = torch.tensor(scales, dtype=torch.float32).to(self._device, non_blocking=True)
        return LoraBatch(self._placed, self._plans, self._widths, rows, lora_indices, lora_scales)

    def has_score_head(self, ref: AdapterRef) -> bool:
        """Whether an adapter that has been acquired or loaded answers score requests."""
        row = self._row_of.get(ref)
        if row is not None:
            found = self._rows[row]
            assert found is not None
            return found.has_score_head
        return ref in self._host and self._host[ref].packed.has_score_head

    def score(self, row: int, hidden: torch.Tensor) -> float:
        """The score head's answer for one token: hidden [hidden_size] after the final norm.

        Raises:
            AdapterError: the adapter in that row has no score head.
        """
        placed = self._placed[row]
        assert placed is not None, f"row {row} is empty"
        module = placed.get(SCORE_HEAD)
        if module is None or module.dense is None:
            found = self._rows[row]
            name = found.ref.name if found is not None else "?"
            raise AdapterError(
                f"Adapter {name!r} has no score head; it cannot answer score requests."
            )
        return float(torch.dot(module.dense[0], hidden.float()))

    # What the server asks for.

    def preload(self, ref: AdapterRef, *, pinned: bool, done: PreloadDone) -> None:
        """Read, check and place an adapter; done is called once, in a later poll as a rule.

        An adapter for which no row is free is answered when it is in host memory; it is placed when it is first used.
        A pinned one keeps its row from its first placement until it is unloaded.
        """
        self._failures.pop(ref, None)
        self._unloading.discard(ref)
        self._waiting.setdefault(ref, []).append(done)
        self._pinned.discard(ref)
        if pinned and len(self._pinned) >= len(self._rows) - 1:
            error = AdapterError(
                f"Adapter {ref.name!r} cannot be pinned: {len(self._pinned)} of {len(self._rows)} rows "
                f"are pinned and one must stay free for the others. Raise --max-loras or unload a "
                f"pinned adapter."
            )
            self._fail_waiting(ref, error)
            return
        if pinned:
            self._pinned.add(ref)
        if ref not in self._row_of and ref not in self._host:
            self._start_loading(ref)

    def unload(self, ref: AdapterRef) -> None:
        """Forget an adapter: at once when nobody uses it, else when its last user releases it."""
        self._pinned.discard(ref)
        self._failures.pop(ref, None)
        if ref in self._num_users:
            self._unloading.add(ref)
        else:
            self._forget(ref)

    def poll(self) -> None:
        """Take over what the loader has finished. Once per step, and when idle while is_loading."""
        for ref, future in list(self._loading.items()):
            if future.done():
                del self._loading[ref]
                self._take_over(ref, future)
        for ref in [ref for ref in self._waiting if ref in self._row_of or ref in self._host]:
            self._answer(ref)
        for ref in [ref for ref in self._pinned if ref not in self._row_of]:
            try:
                if self._place(ref) is None:
                    self._start_loading(ref)
            except NotEnoughMemory:
                self._pinned.discard(ref)  # it still runs when there is room

    def close(self) -> None:
        """Stop the loader thread once it has finished what it is reading."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def is_loading(self) -> bool:
        """Whether poll has, or soon will have, something to do."""
        return bool(self._loading or self._waiting)

    @property
    def resident(self) -> tuple[tuple[int, int], ...]:
        """(uid, generation) of each adapter in a row."""
        return tuple((row.ref.uid, row.ref.generation) for row in self._rows if row is not None)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not agree; for tests and idle moments."""
        for ref, row in self._row_of.items():
            found = self._rows[row]
            assert found is not None and found.ref == ref, (
                f"row {row} holds {found}, the index says {ref}"
            )
            assert self._placed[row] is not None, f"row {row} is in use and empty"
        for row, (found, placed) in enumerate(zip(self._rows, self._placed, strict=True)):
            assert (found is None) == (placed is None), f"row {row} is half filled"
            assert found is None or self._row_of.get(found.ref) == row, (
                f"row {row} holds {found}, which has another"
            )
        assert all(count > 0 and ref in self._row_of for ref, count in self._num_users.items()), (
            self._num_users
        )
        assert self._unloading <= set(self._num_users), "an adapter to be unloaded has no user left"
        assert len(self._host) <= self._config.max_cpu_loras, (
            "more adapters in host memory than --max-cpu-loras"
        )
        assert len(self._pinned) < len(self._rows), "every row is pinned"

    # Placing and giving way.

    def _place(self, ref: AdapterRef) -> int | None:
        """Copy an adapter from host memory into a row; None where it is not there or no row is free.

        Raises:
            NotEnoughMemory: the device has no room, even without the idle adapters.
        """
        loaded = self._host.get(ref)
        if loaded is None:
            return None
        row = self._free_row()
        if row is None:
            return None
        started = time.perf_counter()
        self._placed[row] = self._copy_to_device(ref, loaded.packed)
        self._rows[row] = _Row(ref, loaded.packed.has_score_head, loaded.packed.num_bytes)
        self._row_of[ref] = row
        self._host.move_to_end(ref)
        self._plans.clear()
        self.load_s += time.perf_counter() - started
        return row

    def _copy_to_device(self, ref: AdapterRef, packed: PackedAdapter) -> PlacedAdapter:
        try:
            return packed.place(self._device)
        except torch.OutOfMemoryError:
            for other in [other for other in self._row_of if self._is_idle(other)]:
                self._empty_row(other)
                self.num_evictions += 1
        try:
            return packed.place(self._device)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(
                f"Adapter {ref.name!r} needs {packed.num_bytes} bytes on the device and they are not "
                f"free. Lower --gpu-memory-utilization or --max-loras."
            ) from error

    def _is_idle(self, ref: AdapterRef) -> bool:
        return ref not in self._num_users and ref not in self._pinned

    def _has_free_row(self) -> bool:
        return None in self._rows or any(map(self._is_idle, self._row_of))

    def _free_row(self) -> int | None:
        """An empty row, made by evicting the least recently used idle adapter where there is none."""
        for row, found in enumerate(self._rows):
            if found is None:
                return row
        for ref, row in self._row_of.items():
            if self._is_idle(ref):
                self._empty_row(ref)
                self.num_evictions += 1
                return row
        return None

    def _empty_row(self, ref: AdapterRef) -> None:
        row = self._row_of.pop(ref)
        self._rows[row] = None
        self._placed[row] = None
        self._plans.clear()

    def _forget(self, ref: AdapterRef) -> None:
        self._unloading.discard(ref)
        self._host.pop(ref, None)
        future = self._loading.pop(ref, None)
        if future is not None:
            future.cancel()
        if ref in self._waiting:
            error = AdapterError(f"Adapter {ref.name!r} was unloaded while it was being loaded.")
            self._fail_waiting(ref, error)
        if ref in self._row_of:
            self._empty_row(ref)

    # Loading.

    def _start_loading(self, ref: AdapterRef) -> None:
        if ref not in self._loading and ref not in self._host:
            self._loading[ref] = self._loader.submit(self._read, ref)

    def _read(self, ref: AdapterRef) -> _Loaded:
        """Read, check and pack one adapter; runs in the loader thread and touches none of the pool's books."""
        started = time.perf_counter()
        weights = self._load(ref)
        self._check(ref, weights)
        packed = pack_adapter(
            weights, self._model, self._dtype, pin_memory=self._device.type == "cuda"
        )
        return _Loaded(packed, time.perf_counter() - started)

    def _check(self, ref: AdapterRef, weights: LoraWeights) -> None:
        found = weights.base_fingerprint
        if found is not None and self._fingerprint is not None and found != self._fingerprint:
            raise AdapterError(
                f"Adapter {ref.name!r} was trained on another base: it names fingerprint {found}, this base has "
                f"{self._fingerprint}. Serve it on the base it was trained on."
            )
        rank = largest_rank(weights)
        limit = self._config.max_lora_rank
        if limit is not None and rank > limit:
            raise AdapterError(
                f"Adapter {ref.name!r} has rank {rank}, --max-lora-rank is {limit}. Raise it or leave it out."
            )

    def _take_over(self, ref: AdapterRef, future: Future[_Loaded]) -> None:
        try:
            loaded = future.result()
        except EngineError as error:
            self._fail(ref, error if isinstance(error, AdapterError) else AdapterError(str(error)))
            return
        except (
            Exception
        ) as error:  # the boundary to the loader thread: whatever it hit is that adapter's failure
            self._fail(
                ref,
                AdapterError(
                    f"Adapter {ref.name!r} could not be loaded: {type(error).__name__}: {error}"
                ),
            )
            return
        self.num_loads += 1
        self.load_s += loaded.load_s
        self._host[ref] = loaded
        while len(self._host) > self._config.max_cpu_loras:
            self._host.popitem(last=False)
        if ref in self._waiting:
            self._answer(ref)  # now: the next one taken over may push it out of host memory

    def _fail(self, ref: AdapterRef, error: AdapterError) -> None:
        self._failures[ref] = error
        self._fail_waiting(ref, error)

    def _answer(self, ref: AdapterRef) -> None:
        """Tell those who preload an adapter that it is there; place it where a row is free."""
        try:
            row = self._row_of.get(ref)
            if row is None:
                row = self._place(ref)
        except NotEnoughMemory as error:
            self._fail_waiting(ref, error)
            return
        loaded = self._host.get(ref)
        found = self._rows[row] if row is not None else None
        load_s = loaded.load_s if loaded is not None else 0.0
        num_bytes = found.num_bytes if found is not None else 0
        if loaded is not None:
            num_bytes = loaded.packed.num_bytes
        for done in self._waiting.pop(ref, []):
            done(error=None, load_s=load_s, num_bytes=num_bytes)

    def _fail_waiting(self, ref: AdapterRef, error: EngineError) -> None:
        self._pinned.discard(ref)
        for done in self._waiting.pop(ref, []):
            done(error=error.info(), load_s=0.0, num_bytes=0)


def largest_rank(weights: LoraWeights) -> int:
    """The largest rank among an adapter's modules; 0 when it only replaces tensors."""
    return max((module.a.shape[0] for module in weights.modules.values()), default=0)
