"""Token ids back to text while they arrive: whole characters only, and never a piece of a stop
string.

The text of an answer is by definition what these two give when fed to the end; streaming only
decides how often it is looked at. So streamed text and plain text are equal.

Public   Detokenizer, StopChecker, AnswerText
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from server.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoding: characters come out once all their bytes are there."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """prompt_token_ids: what the text continues; empty where it stands on its own (a
        message)."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        visible = next(
            (i for i in reversed(prompt_token_ids) if i not in tokenizer.special_ids), None
        )
        self._previous = visible
        self._is_first = visible is None and tokenizer.drops_first_space
        # "replace" gives one U+FFFD per broken sequence, wherever the chunks are cut.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if token_id in self._tokenizer.special_ids:
            if self._skip_special_tokens:
                return ""
            return self._decoder.decode(self._tokenizer.piece(token_id))
        piece = self._tokenizer.piece(token_id, self._previous)
        if self._is_first:
            piece = piece.removeprefix(b" ")
        self._is_first, self._previous = False, token_id
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """U+FFFD if the text ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Finds the stop string that is complete first, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certainly part of the answer; `found` is set once a stop string is
        complete."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        pending = self._held + text
        # Complete first; of those that end together the one that began first (the longest).
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := pending.find(stop)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return pending[:start]
        num_held = max(_overlap(pending, stop) for stop in self._stops)
        cut = len(pending) - num_held
        self._held = pending[cut:]
        return pending[:cut]

    def finish(self) -> str:
        """The answer ends: what was held back is part of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a proper beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a token's text lies in the answer, in characters."""

    start: int
    end: int


class AnswerText:
    """One choice's text: detokenised, cut at a stop string, with the place of every token.

    Tokens whose text is held back are not released either, or their log-probabilities would
    show what the text hides.
    """

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str], *, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._checker = StopChecker(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded = 0
        self._num_released = 0
        self._waiting: list[Span] = []

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._checker.found

    def push(self, token_id: int) -> tuple[str, list[Span]]:
        """Text that is final, and the spans of the tokens it finishes."""
        self._num_tokens += 1
        text = self._detokenizer.push(token_id)
        self._waiting.append(Span(self._num_decoded, self._num_decoded + len(text)))
        self._num_decoded += len(text)
        if self._num_tokens <= self._min_tokens:
            return self._release(text)  # stop strings count from min_tokens on
        return self._release(self._checker.push(text))

    def finish(self) -> tuple[str, list[Span]]:
        """No token follows: everything held back, unless a stop string was found."""
        text = ""
        if self.stop is None:
            text = self._checker.push(self._detokenizer.finish())
            text += self._checker.finish() if self.stop is None else ""
        released, spans = self._release(text)
        if self.stop is None:
            spans, self._waiting = spans + self._waiting, []
        else:  # a token that began before the stop string is part of the answer
            spans += [span for span in self._waiting if span.start < self._num_released]
        return released, spans

    def _release(self, text: str) -> tuple[str, list[Span]]:
        self._num_released += len(text)
        count = 0
        while count < len(self._waiting) and self._waiting[count].end <= self._num_released:
            count += 1
        spans, self._waiting = self._waiting[:count], self._waiting[count:]
        return text, spans
