"""Sequences that wait for their grammar to be compiled, off the step, before they are queued."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from engine.api import GrammarSpec
from engine.errors import EngineError, GrammarError
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.grammar import Grammar, GrammarCompiler

logger = logging.getLogger(__name__)


class GrammarQueue:
    """Who waits for which compilation."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._waiting: dict[Sequence, Future[Grammar]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence, spec: GrammarSpec) -> None:
        """Start compiling what the sequence must match."""
        self._waiting[sequence] = self._compiler.submit(spec)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence that has ended; False when it does not wait here."""
        future = self._waiting.pop(sequence, None)
        if future is None:
            return False
        future.cancel()
        return True

    def take_done(self) -> list[tuple[Sequence, EngineError | None]]:
        """Those whose grammar is there, set on the sequence, or has turned out to be wrong."""
        done = [(sequence, future) for sequence, future in self._waiting.items() if future.done()]
        outcomes: list[tuple[Sequence, EngineError | None]] = []
        for sequence, future in done:
            del self._waiting[sequence]
            error = future.exception()
            if error is None:
                sequence.grammar = future.result().matcher()
                outcomes.append((sequence, None))
            elif isinstance(error, EngineError):
                outcomes.append((sequence, error))
            else:  # the compiler's boundary: its failure, a native panic included, is one request's
                logger.error("A grammar could not be compiled.", exc_info=error)
                failure = GrammarError(f"The grammar could not be compiled: {error}")
                outcomes.append((sequence, failure))
        return outcomes

    def close(self) -> None:
        """Stop the compiler's threads."""
        self._compiler.close()
