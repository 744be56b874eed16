"""From judgements to training samples, in OpenAI's file formats.

Public   SAMPLES, preference_samples, supervised_samples
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["preference", "supervised"]


@dataclass(slots=True)
class _Judged:
    """All that was said of answers to one conversation; dicts keep the order and drop repeats."""

    prompt: dict[str, Any]
    good: dict[str, None] = field(default_factory=dict)
    bad: dict[str, None] = field(default_factory=dict)
    pairs: dict[tuple[str, str], None] = field(default_factory=dict)
    """(better, worse), as somebody said of these two."""


def preference_samples(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pairs of a better and a worse answer to the same conversation.

    A preferred alternative is better than the answer it was given for; what got thumbs up, or was
    preferred, is better than what got thumbs down.
    """
    for judged in _by_prompt(rows):
        crossed = {(good, bad): None for good in judged.good for bad in judged.bad}
        for better, worse in judged.pairs | crossed:
            if better != worse and (worse, better) not in judged.pairs:
                yield {
                    "input": judged.prompt,
                    "preferred_output": [_assistant(better)],
                    "non_preferred_output": [_assistant(worse)],
                }


def supervised_samples(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Conversations that end in a good answer, which alone is learnt."""
    for judged in _by_prompt(rows):
        earlier = [
            message | {"weight": 0} if message["role"] == "assistant" else message
            for message in judged.prompt["messages"]
        ]
        for answer in judged.good:
            if answer not in judged.bad:
                yield {**judged.prompt, "messages": [*earlier, _assistant(answer)]}


SAMPLES: tuple[tuple[Format, Callable[[list[dict[str, Any]]], Iterator[dict[str, Any]]]], ...] = (
    ("preference", preference_samples),
    ("supervised", supervised_samples),
)


def _by_prompt(rows: Iterable[dict[str, Any]]) -> Iterable[_Judged]:
    found: dict[str, _Judged] = {}
    for row in rows:
        key = json.dumps(row["prompt"], sort_keys=True)
        judged = found.setdefault(key, _Judged(row["prompt"]))
        if row["rating"] in ("up", "down") and row["answer"]:
            (judged.good if row["rating"] == "up" else judged.bad)[row["answer"]] = None
        if row["preferred"]:
            judged.good[row["preferred"]] = None
            if row["answer"]:
                judged.pairs[row["preferred"], row["answer"]] = None
    return found.values()


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
