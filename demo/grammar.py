"""Phrases with choices: "[What is|What's] the capital of {0}?" is two sentences per country.

Syntax   [a|b] is a choice and may be nested; {0}, {1} are the columns of a row; {A0} is column 0
         with a capital letter.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

INNERMOST = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Rows of facts, the ways to ask for them, and the answer."""

    weight: float
    rows: tuple[tuple[str, ...], ...] = ((),)
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...] = ()
    """Other ways to state the fact, for running text; the answer when there are none."""
    follow_ups: tuple[str, ...] = ()
    """How to ask for another row when the question before was of this topic."""


def expand(pattern: str, row: tuple[str, ...], rng: random.Random) -> str:
    """One of the sentences that a pattern stands for."""
    text = pattern
    for i, value in enumerate(row):
        text = text.replace(f"{{{i}}}", value).replace(f"{{A{i}}}", value[:1].upper() + value[1:])
    while "[" in text:
        shorter = INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), text)
        if shorter == text:
            raise ValueError(f"pattern: expected choices like [a|b], got {pattern!r}")
        text = shorter
    return _tidy(text)


IRREGULAR = {
    "mouses": "mice",
    "foxs": "foxes",
    "wolfs": "wolves",
    "fishs": "fish",
    "gooses": "geese",
}
BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])(?!one\b)")


def _tidy(text: str) -> str:
    """What patterns cannot know: "an" before vowels, plurals out of the ordinary, empty choices."""
    text = re.sub(r" {2,}", " ", text)
    text = BEFORE_VOWEL.sub(r"\1n ", text)
    return re.sub(r"\b\w+s\b", lambda match: IRREGULAR.get(match[0], match[0]), text)


def count(pattern: str) -> int:
    """How many sentences a pattern stands for, per row."""
    total = 1
    text = pattern
    while match := INNERMOST.search(text):
        total *= match[1].count("|") + 1
        text = text.replace(match[0], "", 1)
    return total
