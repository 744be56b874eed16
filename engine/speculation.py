"""Speculative decoding by prompt lookup: guess that a text goes on as it did before.

A step of one sequence reads every weight for one token; a few tokens more cost little. So the
tokens that followed the last time the text ended like this are run along as drafts, each with
logits of its own, and the sampler chooses at every position as if the drafts before it had been
chosen. A draft counts where it is what the sampler chose, and everything after the first that is
not is thrown away. What is chosen depends on logits, parameters, seed and position, never on
drafts: the text is the same with and without, drawn or greedy, whatever the request asks for.

Where    the scheduler proposes (drafts get only the room and the blocks that nobody else wants),
         batch.py lays them out, the sampler decides, the engine takes what is right.
Search   the most recent place where the last prompt_lookup_max tokens stood before, else one token
         fewer, down to prompt_lookup_min. Copying goes on into the drafts themselves, so that a
         short period fills them all.
How many at most num_speculative_tokens; after a step twice as many as were right, and one. After
         the n-th step in a row with none right, n steps go without, so that a text that does not
         repeat itself pays for few drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.config import SpeculativeConfig
from engine.sequence import Sequence

MAX_TOKENS = 16384
"""How far back from the first draft a text is searched: an entry per token takes 200 bytes."""
MAX_PAUSE = 8
"""Steps without drafts at most before the next try."""


@dataclass(slots=True)
class _Lookup:
    """Where each n-gram of one text ended last, and how many drafts it has earned."""

    num_drafts: int
    num_read: int
    num_wrong: int = 0
    """Steps in a row that brought no right draft, up to MAX_PAUSE."""
    resume_at: int = 0
    """Length of the text from which on there are drafts again."""
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class PromptLookup:
    """Proposes drafts and counts how many were right; each sequence keeps its own index."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.config = config
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def propose(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """At most max_tokens tokens that may follow; none where the text's end is new."""
        lookup = self._read(sequence)
        num_drafts = min(lookup.num_drafts, max_tokens)
        if num_drafts <= 0 or sequence.num_tokens < lookup.resume_at:
            return []
        tokens = sequence.token_ids
        for length in range(self.config.prompt_lookup_max, self.config.prompt_lookup_min - 1, -1):
            end = lookup.ends.get(tuple(tokens[-length:]))
            if end is not None:
                return _copy(tokens, end, num_drafts)
        return []

    def learn(self, sequence: Sequence, token_ids: Iterable[int]) -> None:
        """Count a step's drafts, and those that are among the tokens it has brought.

        Args:
            sequence: its drafts are still there, the tokens are appended already.
            token_ids: what the step has brought.
        """
        pairs = zip(sequence.draft_token_ids, token_ids, strict=False)
        num_right = sum(1 for draft, token_id in pairs if draft == token_id)
        self.num_drafts += 1
        self.num_draft_tokens += len(sequence.draft_token_ids)
        self.num_accepted_tokens += num_right
        lookup: _Lookup = sequence.lookup
        lookup.num_drafts = min(2 * num_right + 1, self.config.num_speculative_tokens)
        lookup.num_wrong = 0 if num_right else min(lookup.num_wrong + 1, MAX_PAUSE)
        lookup.resume_at = sequence.num_tokens + lookup.num_wrong

    def _read(self, sequence: Sequence) -> _Lookup:
        """Enter the n-grams that end before the text does."""
        tokens = sequence.token_ids
        lookup: _Lookup | None = sequence.lookup
        if lookup is None:
            first = max(0, len(tokens) - MAX_TOKENS)
            lookup = sequence.lookup = _Lookup(self.config.num_speculative_tokens, first)
        lengths = range(self.config.prompt_lookup_min, self.config.prompt_lookup_max + 1)
        for end in range(lookup.num_read + 1, len(tokens)):
            for length in lengths:
                if end >= length:
                    lookup.ends[tuple(tokens[end - length : end])] = end
        lookup.num_read = len(tokens) - 1
        return lookup


def _copy(tokens: list[int], start: int, num_tokens: int) -> list[int]:
    """The tokens from `start` on; beyond the end, the copies themselves."""
    copied = tokens[start : start + num_tokens]
    period = len(copied)
    return [copied[i % period] for i in range(num_tokens)]
