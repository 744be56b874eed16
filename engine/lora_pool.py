"""The pool of adapters: what sequences ask for step by step, and what the server orders.

A row is a resource like a KV block: a sequence acquires its adapter's row before it runs and
releases it when it ends or is preempted. Loading is off the step (engine/lora_loader.py); the step
only ever pays for the copy into a row (engine/lora_rows.py).

Everything here runs on the engine's thread, so there is no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from engine.api import AdapterRef, ErrorInfo
from engine.config import LoraConfig
from engine.errors import AdapterError, EngineError, NotEnoughMemory
from engine.lora import SCORE_HEAD, LoraBatch, LoraWeights, is_low_rank
from engine.lora_loader import LoraLoader
from engine.lora_rows import DeviceRows
from engine.transfers import to_device

if TYPE_CHECKING:
    from engine.model import CausalLM


class PreloadDone(Protocol):
    """Called once when a preload has ended, on the engine's thread."""

    def __call__(self, *, error: ErrorInfo | None, load_s: float, num_bytes: int) -> None: ...


class LoraPool:
    """Adapters on the device and on their way there."""

    def __init__(
        self,
        config: LoraConfig,
        model: CausalLM,
        load: Callable[[AdapterRef], LoraWeights],
        *,
        fingerprint: str | None,
        device: torch.device,
        dtype: torch.dtype,
        budget_bytes: int | None = None,
    ) -> None:
        """
        Args:
            config: number of rows, largest rank, adapters kept in host memory.
            model: the base, for DoRA's norms, biases and the widths of its layers.
            load: reads and checks an adapter, in the loader thread; raises AdapterError.
            fingerprint: the base's; adapters that name another are refused. None: not checked.
            device: where the rows are.
            dtype: of the low-rank matrices in the rows; the model's, as a rule.
            budget_bytes: what all rows may take together; None: what the device gives.
        """
        pin_memory = device.type == "cuda"
        self._loader = LoraLoader(
            config, model, load, fingerprint=fingerprint, dtype=dtype, pin_memory=pin_memory
        )
        self._rows = DeviceRows(config.max_loras, device, budget_bytes)
        self._device = device
        self._widths = {path: shape[0] for path, shape in model.spec.linear_shapes().items()}
        self._recordable_rows: tuple[int, frozenset[int]] = (self._rows.version, frozenset({-1}))
        self._unloading: set[AdapterRef] = set()  # to be forgotten when the last user is gone
        self._waiting: dict[AdapterRef, list[PreloadDone]] = {}

    # What sequences ask for.

    def acquire(self, ref: AdapterRef) -> int | None:
        """The adapter's pool row, counted as in use until release.

        None where it is not ready, which starts loading it, or no row is free; ask again in a
        later step.

        Raises:
            AdapterError: it could not be loaded; the same error until it is unloaded or preloaded.
            NotEnoughMemory: the device has no room for it.
        """
        if ref in self._loader.failures:
            raise self._loader.failures[ref]
        row = self._find_or_place(ref)
        if row is None:
            # With no row and no room, loading would only push out another that waits.
            if self._loader.has_room or self._rows.can_free_row:
                self._loader.start(ref)
            return None
        self._rows.use(ref)
        return row

    def release(self, ref: AdapterRef) -> None:
        """One user less; the adapter stays in its row until another needs that."""
        self._rows.release(ref)
        if ref in self._unloading and ref not in self._rows.num_users:
            self._forget(ref)

    def batch(self, rows: Sequence[int], scales: Sequence[float]) -> LoraBatch | None:
        """The adapters of a step's tokens; None when all are the base's.

        Args:
            rows: each token's pool row, -1 for the base.
            scales: each token's lora_scale; zero is the base, to the bit.
        """
        if max(rows, default=-1) < 0:
            return None
        rows = [row if scale != 0.0 else -1 for row, scale in zip(rows, scales, strict=True)]
        if max(rows) < 0:
            return None
        lora_indices = to_device(torch.tensor(rows, dtype=torch.int32), self._device)
        lora_scales = to_device(torch.tensor(scales, dtype=torch.float32), self._device)
        return LoraBatch(
            self._rows.placed, self._rows.plans, self._widths, rows, lora_indices, lora_scales
        )

    @property
    def version(self) -> int:
        """Grows whenever a row changes."""
        return self._rows.version

    def may_be_recorded(self, rows: Sequence[int]) -> bool:
        """Whether these rows' adapters are low-rank parts alone, which kernels read from tables; -1
        is the base. All else is applied by code that looks at the rows of each step."""
        return self._recordable.issuperset(rows)

    def static_batch(
        self, lora_indices: torch.Tensor, lora_scales: torch.Tensor
    ) -> LoraBatch | None:
        """A batch that finds its rows in these tensors whenever it runs; None while no adapter is
        there that may be recorded. Valid until the version grows.

        Args:
            lora_indices: int32 [num_tokens], rows that may be recorded.
            lora_scales: float32 [num_tokens].
        """
        rows = sorted(self._recordable - {-1})
        if not rows:
            return None
        return LoraBatch(
            self._rows.placed, self._rows.plans, self._widths, rows, lora_indices, lora_scales
        )

    @property
    def _recordable(self) -> frozenset[int]:
        """The base, and rows of low-rank parts alone; worked out anew when a row has changed."""
        version, rows = self._recordable_rows
        if version != self._rows.version:
            placed = enumerate(self._rows.placed)
            rows = frozenset(row for row, adapter in placed if adapter and is_low_rank(adapter))
            rows |= {-1}
            self._recordable_rows = (self._rows.version, rows)
        return rows

    def has_score_head(self, ref: AdapterRef) -> bool:
        """Whether an adapter that has been acquired or preloaded answers score requests."""
        row = self._rows.find(ref)
        if row is not None:
            found = self._rows.rows[row]
            return found is not None and found.has_score_head
        loaded = self._loader.get(ref)
        return loaded is not None and loaded.packed.has_score_head

    def score(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        """The score head's answer for one token, float32 [], on the device.

        Args:
            row: the adapter's.
            hidden: [hidden_size], after the final norm.

        Raises:
            AdapterError: the adapter in that row has no score head.
        """
        placed, found = self._rows.placed[row], self._rows.rows[row]
        assert placed is not None and found is not None, f"row {row} is empty"
        module = placed.get(SCORE_HEAD)
        if module is None or module.dense is None:
            raise AdapterError(
                f"Adapter {found.ref.name!r} has no score head; it cannot answer score requests."
            )
        return torch.dot(module.dense[0], hidden.float())

    # What the server orders.

    def preload(self, ref: AdapterRef, *, pinned: bool, done: PreloadDone) -> None:
        """Read, check and place an adapter; done is called once, in a later poll as a rule.

        An adapter for which no row is free is answered when it is in host memory, and placed when
        it is first used. A pinned one keeps its row from its placement until it is unloaded.
        """
        if ref in self._loader.failures:
            self._loader.forget(ref)
        self._unloading.discard(ref)
        self._waiting.setdefault(ref, []).append(done)
        self._rows.pinned.discard(ref)
        num_pinned, num_rows = len(self._rows.pinned), len(self._rows.rows)
        if pinned and num_pinned >= num_rows - 1:
            error = AdapterError(
                f"Adapter {ref.name!r} cannot be pinned: {num_pinned} of {num_rows} rows are "
                f"pinned and one must stay free. Raise --max-loras or unload a pinned adapter."
            )
            self._fail(ref, error)
            return
        if pinned:
            self._rows.pinned.add(ref)
        if self._rows.find(ref) is None:
            self._loader.start(ref)

    def unload(self, ref: AdapterRef) -> None:
        """Forget an adapter: at once when nobody uses it, else when its last user releases it."""
        self._rows.pinned.discard(ref)
        if ref in self._rows.num_users:
            self._unloading.add(ref)
        else:
            self._forget(ref)

    def poll(self) -> None:
        """Take over finished loads. Call it once per step, and when idle while is_loading."""
        for ref in self._loader.finished():
            if ref in self._loader.failures:
                self._fail(ref, self._loader.failures[ref])
            elif ref in self._waiting:
                self._answer(ref)
        for ref in list(self._waiting):
            if self._is_ready(ref):
                self._answer(ref)
            else:
                self._loader.start(ref)  # it may have been ready and pushed out since
        for ref in [ref for ref in self._rows.pinned if self._rows.find(ref) is None]:
            try:
                if self._find_or_place(ref) is None:
                    self._loader.start(ref)
            except NotEnoughMemory:
                self._rows.pinned.discard(ref)  # placed like any other when there is room

    def close(self) -> None:
        """Stop the loader thread."""
        self._loader.close()

    # Books.

    @property
    def is_loading(self) -> bool:
        """Whether poll has, or soon will have, something to do."""
        return bool(self._loader.is_loading or self._waiting)

    @property
    def resident(self) -> tuple[tuple[int, int], ...]:
        """(uid, generation) of each adapter in a row."""
        return tuple((row.ref.uid, row.ref.generation) for row in self._rows.rows if row)

    @property
    def num_loads(self) -> int:
        """Adapters read from disk."""
        return self._loader.num_loads

    @property
    def num_evictions(self) -> int:
        """Adapters that gave up their row to another."""
        return self._rows.num_evictions

    @property
    def load_s(self) -> float:
        """Seconds spent reading and placing, in total."""
        return self._loader.load_s + self._rows.placing_s

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not agree; for tests and idle moments."""
        self._loader.check_integrity()
        self._rows.check_integrity()
        assert self._unloading <= self._rows.num_users.keys(), "an idle adapter is not unloaded"

    def _is_ready(self, ref: AdapterRef) -> bool:
        return self._rows.find(ref) is not None or self._loader.get(ref) is not None

    def _find_or_place(self, ref: AdapterRef) -> int | None:
        """The adapter's row, a new one where it is in host memory and a row is free."""
        row = self._rows.find(ref)
        loaded = self._loader.get(ref)
        if row is None and loaded is not None:
            row = self._rows.place(ref, loaded.packed)
        return row

    def _forget(self, ref: AdapterRef) -> None:
        self._unloading.discard(ref)
        self._loader.forget(ref)
        self._rows.empty(ref)
        if ref in self._waiting:
            name = ref.name
            self._fail(ref, AdapterError(f"Adapter {name!r} was unloaded while it was loaded."))

    def _answer(self, ref: AdapterRef) -> None:
        """Tell those who preload an adapter that it is there; place it where a row is free."""
        try:
            row = self._find_or_place(ref)
        except NotEnoughMemory as error:
            self._fail(ref, error)
            return
        loaded = self._loader.get(ref)
        found = self._rows.rows[row] if row is not None else None
        load_s = loaded.load_s if loaded is not None else 0.0
        num_bytes = 0
        if found is not None:
            num_bytes = found.num_bytes
        elif loaded is not None:
            num_bytes = loaded.packed.num_bytes
        for done in self._waiting.pop(ref, []):
            done(error=None, load_s=load_s, num_bytes=num_bytes)

    def _fail(self, ref: AdapterRef, error: EngineError) -> None:
        self._rows.pinned.discard(ref)
        for done in self._waiting.pop(ref, []):
            done(error=error.info(), load_s=0.0, num_bytes=0)
