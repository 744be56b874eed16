"""Where the loader finds an adapter: in memory, where training has put it there, else on disk."""

from __future__ import annotations

from collections.abc import Callable

from engine.api import AdapterRef
from engine.lora import LoraWeights


class LoraSource:
    """Put and forgotten by the engine's thread, called by the loader's."""

    def __init__(self, read: Callable[[AdapterRef], LoraWeights]) -> None:
        """
        Args:
            read: reads and checks an adapter on disk; raises AdapterError.
        """
        self._read = read
        self._once: dict[AdapterRef, LoraWeights] = {}
        self._kept: dict[AdapterRef, LoraWeights] = {}

    def __call__(self, ref: AdapterRef) -> LoraWeights:
        """An adapter's weights; one that is in memory for one load is read from disk later on."""
        weights = self._once.pop(ref, None) or self._kept.get(ref)
        return weights if weights is not None else self._read(ref)

    def put(self, ref: AdapterRef, weights: LoraWeights, *, keep: bool) -> None:
        """Have the loader find these weights.

        Args:
            ref:     a generation that has not been loaded.
            weights: its weights.
            keep:    until they are forgotten, because they are nowhere else; else for one load.
        """
        (self._kept if keep else self._once)[ref] = weights

    def forget(self, ref: AdapterRef) -> None:
        """Drop an adapter that nobody will load again."""
        self._once.pop(ref, None)
        self._kept.pop(ref, None)
