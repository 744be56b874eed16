"""LoadAdapter and UnloadAdapter: passed on to the pool, answered when they are done.

An adapter is unloaded when the last request that names it has ended, waiting ones included: a
preempted sequence must find its adapter again.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from engine.api import AdapterRef, AdapterReply, ErrorInfo, LoadAdapter, UnloadAdapter

if TYPE_CHECKING:
    from engine.lora_pool import LoraPool


class AdapterCommands:
    """Which adapters are pinned, used and to be unloaded, and the answers that are due."""

    def __init__(self, pool: LoraPool, pinned: set[AdapterRef]) -> None:
        """
        Args:
            pool:   the rows.
            pinned: kept up to date here, read by the scheduler.
        """
        self._pool = pool
        self._pinned = pinned
        self._num_users: Counter[AdapterRef] = Counter()
        self._unloads: dict[AdapterRef, list[int]] = {}
        self._replies: list[AdapterReply] = []

    @property
    def has_work(self) -> bool:
        """Whether an answer is due or will be without a further command."""
        return bool(self._replies or self._unloads or self._pool.is_loading)

    def load(self, command: LoadAdapter) -> None:
        """Start loading; answered when the adapter is ready or has failed."""
        ref = command.ref

        def done(*, error: ErrorInfo | None, load_s: float, num_bytes: int) -> None:
            if error is not None:
                self._pinned.discard(ref)
            self._replies.append(
                AdapterReply(
                    command_id=command.command_id, error=error, load_s=load_s, num_bytes=num_bytes
                )
            )

        self._pinned.discard(ref)
        if command.pinned:
            self._pinned.add(ref)
        self._pool.preload(ref, pinned=command.pinned, done=done)

    def unload(self, command: UnloadAdapter) -> None:
        """Forget an adapter, now or when no request uses it; answered when that has happened."""
        self._unloads.setdefault(command.ref, []).append(command.command_id)
        self._forget_unused(command.ref)

    def drop(self, ref: AdapterRef) -> None:
        """unload, for one that nobody waits for."""
        self._unloads.setdefault(ref, [])
        self._forget_unused(ref)

    def begin_use(self, ref: AdapterRef | None) -> None:
        """A request that names this adapter has been accepted."""
        if ref is not None:
            self._num_users[ref] += 1

    def end_use(self, ref: AdapterRef | None) -> None:
        """A request that names this adapter has ended."""
        if ref is None:
            return
        self._num_users[ref] -= 1
        if not self._num_users[ref]:
            del self._num_users[ref]
            self._forget_unused(ref)

    def take_replies(self) -> list[AdapterReply]:
        """The answers that have become due."""
        replies, self._replies = self._replies, []
        return replies

    def check_integrity(self, refs: list[AdapterRef]) -> None:
        """Raise AssertionError unless exactly these adapters, one per request, are in use."""
        users = Counter(refs)
        assert users == self._num_users, f"{users} use adapters, {self._num_users} were counted"

    def _forget_unused(self, ref: AdapterRef) -> None:
        if ref in self._unloads and ref not in self._num_users:
            self._pinned.discard(ref)
            self._pool.unload(ref)
            self._replies += [AdapterReply(command_id=i) for i in self._unloads.pop(ref)]
