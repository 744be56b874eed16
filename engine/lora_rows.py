"""The rows of the pool: which adapter has which, who uses them, and which one gives way.

Rows hold exactly what an adapter needs: no padding to a largest rank. An idle adapter stays in its
row until another needs it, least recently used first; one in use or pinned never gives way.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch

from engine.api import AdapterRef
from engine.errors import NotEnoughMemory
from engine.lora import LayerPlan, PlacedAdapter
from engine.lora_placement import PackedAdapter
from engine.memory import format_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """What one row holds."""

    ref: AdapterRef
    has_score_head: bool
    num_bytes: int


class DeviceRows:
    """A fixed number of rows on one device, and the bytes that all of them may take."""

    def __init__(
        self, num_rows: int, device: torch.device, budget_bytes: int | None = None
    ) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self.rows: list[Row | None] = [None] * num_rows
        self.placed: list[PlacedAdapter | None] = [None] * num_rows
        self.plans: dict[tuple[str, ...], LayerPlan] = {}
        """What the adapters do to each projection, for LoraBatch; emptied when a row changes."""
        self.num_users: Counter[AdapterRef] = Counter()
        self.pinned: set[AdapterRef] = set()
        """Adapters that keep their row, once they have one, although nobody uses them."""
        self.version = 0
        """Grows whenever a row changes."""
        self.num_evictions = 0
        self.placing_s = 0.0
        self._row_of: OrderedDict[AdapterRef, int] = OrderedDict()  # least recently used first

    def find(self, ref: AdapterRef) -> int | None:
        """The adapter's row, None where it has none."""
        return self._row_of.get(ref)

    def place(self, ref: AdapterRef, packed: PackedAdapter) -> int | None:
        """Copy an adapter into a row; None where none is free.

        Raises:
            NotEnoughMemory: the device has no room, even without the idle adapters; or it would
                take more than all rows may.
        """
        if not self._make_room(ref, packed.num_bytes):
            return None
        row = self._free_row()
        if row is None:
            return None
        started = time.perf_counter()
        self.placed[row] = self._copy_to_device(ref, packed)
        self.rows[row] = Row(ref, packed.has_score_head, packed.num_bytes)
        self._row_of[ref] = row
        self._changed()
        self.placing_s += time.perf_counter() - started
        return row

    def use(self, ref: AdapterRef) -> None:
        """One user more, of an adapter that has a row."""
        self.num_users[ref] += 1
        self._row_of.move_to_end(ref)

    def release(self, ref: AdapterRef) -> None:
        """One user less."""
        assert self.num_users[ref] > 0, f"{ref} is released more often than acquired"
        self.num_users[ref] -= 1
        if self.num_users[ref] == 0:
            del self.num_users[ref]

    def empty(self, ref: AdapterRef) -> None:
        """Take an adapter that nobody uses out of its row, where it has one."""
        row = self._row_of.pop(ref, None)
        if row is not None:
            self.rows[row] = None
            self.placed[row] = None
            self._changed()

    def _changed(self) -> None:
        self.plans.clear()
        self.version += 1

    @property
    def can_free_row(self) -> bool:
        """Whether a row is empty or may become so; room for the bytes is another matter."""
        return None in self.rows or any(map(self._is_idle, self._row_of))

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not agree."""
        refs = {row.ref: index for index, row in enumerate(self.rows) if row is not None}
        assert refs == dict(self._row_of), f"the rows hold {refs}, the index says {self._row_of}"
        filled = [row is not None for row in self.rows]
        assert filled == [placed is not None for placed in self.placed], "a row is half filled"
        assert all(count > 0 for count in self.num_users.values()), self.num_users
        assert self.num_users.keys() <= refs.keys(), "an adapter in use has no row"
        assert len(self.pinned) < len(self.rows), "every row is pinned"

    def _is_idle(self, ref: AdapterRef) -> bool:
        return ref not in self.num_users and ref not in self.pinned

    def _make_room(self, ref: AdapterRef, num_bytes: int) -> bool:
        """Let idle adapters go until so many bytes are within the budget; False where those in use
        leave too few."""
        if self._budget_bytes is None:
            return True
        rows = [row for row in self.rows if row is not None]
        staying = sum(row.num_bytes for row in rows if row.ref in self.pinned)
        if staying + num_bytes > self._budget_bytes:
            raise NotEnoughMemory(
                f"Adapter {ref.name!r} takes {format_bytes(num_bytes)}, pinned ones take "
                f"{format_bytes(staying)}, and {format_bytes(self._budget_bytes)} are kept for "
                f"adapters. Raise --max-lora-rank or --max-loras."
            )
        in_use = sum(row.num_bytes for row in rows if not self._is_idle(row.ref))
        if in_use + num_bytes > self._budget_bytes:
            return False
        idle = list(filter(self._is_idle, self._row_of))  # least recently used first
        taken = sum(row.num_bytes for row in rows)
        while taken + num_bytes > self._budget_bytes:
            found = self.rows[self._row_of[idle[0]]]
            assert found is not None
            taken -= found.num_bytes
            self._evict(idle.pop(0))
        return True

    def _free_row(self) -> int | None:
        """An empty row; where there is none, the least recently used idle adapter's."""
        if None in self.rows:
            return self.rows.index(None)
        for ref, row in self._row_of.items():
            if self._is_idle(ref):
                self._evict(ref)
                return row
        return None

    def _evict(self, ref: AdapterRef) -> None:
        self.empty(ref)
        self.num_evictions += 1

    def _copy_to_device(self, ref: AdapterRef, packed: PackedAdapter) -> PlacedAdapter:
        try:
            return packed.place(self._device)
        except torch.OutOfMemoryError:
            for other in filter(self._is_idle, list(self._row_of)):
                self._evict(other)
        try:
            return packed.place(self._device)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(
                f"Adapter {ref.name!r} needs {packed.num_bytes} bytes on the device and they are "
                f"not free. Lower --gpu-memory-utilization or --max-loras."
            ) from error
