"""The requests that wait to run, and whose turn it is.

Strict between priority levels, fair between adapters within one: the next sequence is of the
adapter that has the fewest sequences running; among equals, of the one whose last turn is longest
ago. Within an adapter, arrival order. So an adapter with hundreds of waiting requests takes what
nobody else wants, and no more than its share of the rest: a newcomer gets the first place that
becomes free. The base model counts as one adapter.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Iterator, Mapping

from engine.api import AdapterRef
from engine.sequence import Sequence

AdapterKey = AdapterRef | None


class WaitingQueue:
    """Waiting sequences by priority level and adapter."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[AdapterKey, list[Sequence]]] = {}
        self._last_turn: dict[AdapterKey, int] = {}
        self._num_turns = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for queues in self._levels.values():
            for queue in queues.values():
                yield from queue

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; a preempted one gets its old place back, as its arrival is older."""
        queues = self._levels.setdefault(sequence.request.priority, {})
        insort(queues.setdefault(sequence.adapter, []), sequence, key=_arrival)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands.

        Raises:
            KeyError, ValueError: it is not here.
        """
        queues = self._levels[sequence.request.priority]
        queue = queues[sequence.adapter]
        queue.remove(sequence)
        self._num_waiting -= 1
        if not queue:
            del queues[sequence.adapter]
            if not queues:
                del self._levels[sequence.request.priority]

    def take_turn(self, sequence: Sequence) -> None:
        """Take out a sequence that is about to run and note its adapter's turn."""
        self.remove(sequence)
        self._num_turns += 1
        self._last_turn[sequence.adapter] = self._num_turns

    def best_priority(self, adapter: AdapterKey) -> int | None:
        """The most urgent level on which an adapter waits; None when it does not."""
        levels = (level for level, queues in self._levels.items() if adapter in queues)
        return min(levels, default=None)

    def next(
        self, num_running: Mapping[AdapterKey, int], passed_over: Container[AdapterKey]
    ) -> Sequence | None:
        """Whose turn it is; adapters in `passed_over` cannot run in this step."""
        for priority in sorted(self._levels):
            queues = self._levels[priority]
            best: tuple[int, int, int] | None = None
            choice: Sequence | None = None
            for adapter, queue in queues.items():
                if adapter in passed_over:
                    continue
                head = queue[0]
                key = (num_running.get(adapter, 0), self._last_turn.get(adapter, 0), head.arrival)
                if best is None or key < best:
                    best, choice = key, head
            if choice is not None:
                return choice
        return None


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
