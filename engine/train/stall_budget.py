"""How much training may run between two steps of the streams: --train-max-stall-ms, as a budget.

Each step of the streams earns the budget; a slice runs when what it is expected to take has been
earned, and pays what it has taken. So streams wait no longer than the budget between two of their
tokens, a slice that overran is paid for by the steps that follow, and a slice that is longer than
the whole budget still runs after enough steps: training slows down and never stands still.
"""

from __future__ import annotations

from collections.abc import Hashable

DECAY = 0.8
"""How slowly the estimate of a kind of slice forgets a long one."""


class StallBudget:
    """Seconds earned and paid. Durations are learnt for each kind of slice."""

    def __init__(self, max_stall_s: float) -> None:
        self.max_stall_s = max_stall_s
        self._earned_s = 0.0
        self._estimates_s: dict[Hashable, float] = {}

    def earn(self) -> None:
        """The streams have had a step."""
        self._earned_s += self.max_stall_s

    def may_run(self, kind: Hashable) -> bool:
        """Whether a slice of this kind may run before the next step of the streams.

        What is earned beyond one budget, or beyond this slice where it is longer, is forgotten:
        nothing is saved up for a long stall later.
        """
        expected_s = self.expected_s(kind)
        self._earned_s = min(self._earned_s, max(self.max_stall_s, expected_s))
        return expected_s <= self._earned_s

    def expected_s(self, kind: Hashable) -> float:
        """What a slice of this kind takes; of an unknown one, the whole budget."""
        return self._estimates_s.get(kind, self.max_stall_s)

    def pay(self, kind: Hashable, elapsed_s: float) -> None:
        """A slice has run between two steps of the streams."""
        self._earned_s -= elapsed_s
        self.learn(kind, elapsed_s)

    def learn(self, kind: Hashable, elapsed_s: float) -> None:
        """Note what a slice has taken: at once where it was longer than expected."""
        known_s = self._estimates_s.get(kind)
        if known_s is None or elapsed_s >= known_s:
            self._estimates_s[kind] = elapsed_s
        else:
            self._estimates_s[kind] = DECAY * known_s + (1 - DECAY) * elapsed_s
