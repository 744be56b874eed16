"""Names, uids and generations: what `model` in a request means, now and while the request runs.

A name belongs to one uid from its first load until it is removed. Each load is a generation,
numbered upwards. Requests hold the generation that they began with; one that is neither current,
nor among the last few, nor in use is freed. A rollback makes an older generation current again
under its own number: the prefix cache is keyed by (uid, generation), and equal numbers must mean
equal weights.

Publishing has two phases, because the engine must have loaded the weights before a request may
name them: prepare (files: call it in a thread), then commit or discard.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.format import AdapterInfo
from adapters.generations import Generation, GenerationFolder
from adapters.resolve import check_name
from engine.api import AdapterRef
from engine.errors import AdapterError, AdapterNotFound

if TYPE_CHECKING:
    from engine.model_config import ModelSpec

NUM_KEPT_GENERATIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """An adapter as it is now; a copy that does not change."""

    name: str
    ref: AdapterRef
    """The current generation."""
    info: AdapterInfo
    source: str
    created_at: float
    """When the current generation was prepared, Unix time."""
    generations: tuple[int, ...]
    """Those that rollback can make current, ascending."""
    pinned: bool
    num_requests: int
    """Requests begun since the name was first loaded, over all generations."""
    num_running: int
    """Requests that hold some generation of it now."""


@dataclass(slots=True)
class _Entry:
    uid: int
    current: int
    generations: dict[int, Generation] = field(default_factory=dict)
    pinned: bool = False
    num_requests: int = 0


class Registry:
    """The adapters of one server. Call it from one thread, save prepare, which any thread may."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        on_freed: Callable[[AdapterRef], None] = lambda ref: None,  # noqa: ARG005
        num_kept: int = NUM_KEPT_GENERATIONS,
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            spec: the base that adapters must fit.
            on_freed: called with each generation that nobody will ask for again; the engine may
                forget it.
            num_kept: generations kept for rollback, the newest one included.
            folder: where copies of adapters are kept; the system's temporary folder by default.
        """
        self._copies = GenerationFolder(spec, folder)
        self._on_freed = on_freed
        self._num_kept = num_kept
        self._lock = threading.Lock()
        self._uids = itertools.count(1)
        self._last_generation: Counter[int] = Counter()
        self._entries: dict[str, _Entry] = {}
        self._num_users: Counter[AdapterRef] = Counter()
        self._dropped: set[AdapterRef] = set()  # in use, and to be freed at their last release

    # Publishing.

    def prepare(
        self,
        name: str,
        path: str | Path,
        *,
        load_inplace: bool = True,
        roots: Sequence[Path] | None = None,
    ) -> Generation:
        """Copy an adapter's files and check them; nothing is visible to requests yet.

        Args:
            name: what requests will call it.
            path: folder in PEFT format.
            load_inplace: allow a name that is loaded already: this becomes its next generation.
            roots: where its files must really lie (adapters/confine.py); None: anywhere.

        Raises:
            AdapterError: the name is not allowed or taken, or the adapter does not fit the base.
        """
        check_name(name)
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and not load_inplace:
                raise AdapterError(
                    f"Adapter {name!r} is loaded already, as generation {entry.current}. Set "
                    f"load_inplace to publish this one as its next generation, or choose another "
                    f"name."
                )
            uid = entry.uid if entry is not None else next(self._uids)
            self._last_generation[uid] += 1
            generation = self._last_generation[uid]
        return self._copies.take(name, uid, generation, path, roots)

    def commit(self, prepared: Generation, *, pinned: bool = False) -> AdapterRecord:
        """Make a prepared generation the current one; requests that come from now on get it.

        Raises:
            AdapterError: meanwhile the name was removed and loaded anew.
        """
        ref = prepared.ref
        with self._lock:
            entry = self._entries.get(ref.name)
            if entry is not None and entry.uid != ref.uid:
                raise AdapterError(
                    f"Adapter {ref.name!r} was removed and loaded anew while this one was being "
                    f"loaded. Load it again."
                )
            if entry is None:
                entry = self._entries[ref.name] = _Entry(ref.uid, ref.generation)
            entry.generations[ref.generation] = prepared
            entry.current = ref.generation
            entry.pinned = pinned
            kept = {*sorted(entry.generations)[-self._num_kept :], entry.current}
            dropped = [
                entry.generations.pop(number) for number in sorted(entry.generations.keys() - kept)
            ]
        for generation in dropped:
            self._drop(generation.ref)
        return self.resolve(ref.name)

    def discard(self, prepared: Generation) -> None:
        """Forget a prepared generation that could not be loaded."""
        self._free(prepared.ref)

    def publish(
        self, name: str, path: str | Path, *, load_inplace: bool = True, pinned: bool = False
    ) -> AdapterRecord:
        """prepare and commit in one, for when no request can come before the engine has it."""
        return self.commit(self.prepare(name, path, load_inplace=load_inplace), pinned=pinned)

    def rollback(self, name: str, generation: int | None = None) -> AdapterRecord:
        """Make an older generation current again, under its own number.

        Args:
            name: of the adapter.
            generation: which; None takes the one before the current.

        Raises:
            AdapterNotFound: no such name.
            AdapterError: no such generation is kept.
        """
        entry = self._entry(name)
        older = [number for number in entry.generations if number < entry.current]
        target = generation if generation is not None else max(older, default=None)
        if target is None or target not in entry.generations:
            wanted = "earlier generation" if target is None else f"generation {target}"
            kept = ", ".join(map(str, sorted(entry.generations)))
            raise AdapterError(
                f"Adapter {name!r} has no {wanted} to go back to; it has {kept}, and "
                f"{entry.current} is current."
            )
        entry.current = target
        return self.resolve(name)

    def remove(self, name: str) -> None:
        """Forget a name. Requests that run keep their generation until they end.

        Raises:
            AdapterNotFound: no such name.
        """
        entry = self._entry(name)
        del self._entries[name]
        for generation in entry.generations.values():
            self._drop(generation.ref)

    # Using.

    def acquire(self, name: str) -> AdapterRef:
        """The current generation, held until release.

        Raises:
            AdapterNotFound: no such name.
        """
        entry = self._entry(name)
        ref = entry.generations[entry.current].ref
        entry.num_requests += 1
        self._num_users[ref] += 1
        return ref

    def release(self, ref: AdapterRef) -> None:
        """One user less; the last one frees a generation that was removed or replaced long ago."""
        assert self._num_users[ref] > 0, f"{ref} is released more often than acquired"
        self._num_users[ref] -= 1
        if self._num_users[ref] == 0:
            del self._num_users[ref]
            if ref in self._dropped:
                self._dropped.discard(ref)
                self._free(ref)

    def resolve(self, name: str) -> AdapterRecord:
        """The adapter of that name.

        Raises:
            AdapterNotFound: no such name.
        """
        entry = self._entry(name)
        current = entry.generations[entry.current]
        return AdapterRecord(
            name=name,
            ref=current.ref,
            info=current.info,
            source=current.source,
            created_at=current.created_at,
            generations=tuple(sorted(entry.generations)),
            pinned=entry.pinned,
            num_requests=entry.num_requests,
            num_running=sum(
                count for ref, count in self._num_users.items() if ref.uid == entry.uid
            ),
        )

    def names(self) -> tuple[str, ...]:
        """In the order in which they were first loaded."""
        return tuple(self._entries)

    def records(self) -> tuple[AdapterRecord, ...]:
        return tuple(self.resolve(name) for name in self._entries)

    def close(self) -> None:
        """Remove every copy from disk."""
        self._copies.close()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise AdapterNotFound(
                f"No adapter {name!r} is loaded; loaded are {', '.join(self._entries) or 'none'}. "
                f"Load it first, or name the base model."
            )
        return entry

    def _drop(self, ref: AdapterRef) -> None:
        if ref in self._num_users:
            self._dropped.add(ref)
        else:
            self._free(ref)

    def _free(self, ref: AdapterRef) -> None:
        self._on_freed(ref)
        self._copies.remove(ref.path)
