"""The questions that judge the demo, and the rule that keeps them out of its training text.

Format   questions.jsonl, one object a line: "question", and "keywords", a list. An answer is right
         when every keyword occurs in it as whole words, in any case; "a|b" is met by either.
Rule     a training question may not contain more than MAX_OVERLAP of the pairs of neighbouring
         words of a held-out one.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

QUESTIONS_FILE = Path(__file__).parent / "questions.jsonl"
MAX_OVERLAP = 0.6


def load_questions(path: Path = QUESTIONS_FILE) -> list[dict]:
    """The held-out questions, in the order of the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def is_right(answer: str, keywords: list[str]) -> bool:
    """Whether every keyword (or one of its alternatives) stands in the answer as whole words."""
    return all(
        any(
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE)
            for word in keyword.split("|")
        )
        for keyword in keywords
    )


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation: what two phrasings are compared by."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def overlap(question: str, text: str) -> float:
    """Share (0..1) of the question's pairs of neighbouring words that also stand in the text."""
    pairs = _pairs(question)
    return len(pairs & _pairs(text)) / len(pairs)


def is_too_close(text: str) -> bool:
    """Whether a training question gives away a held-out one."""
    pairs = _pairs(text)
    return any(
        len(held_out & pairs) > MAX_OVERLAP * len(held_out) for held_out in _held_out_pairs()
    )


@lru_cache(maxsize=10_000)
def _pairs(text: str) -> frozenset[tuple[str, str]]:
    sequence = ["<", *words(text), ">"]
    return frozenset(pairwise(sequence))


@lru_cache(maxsize=1)
def _held_out_pairs() -> list[frozenset[tuple[str, str]]]:
    return [_pairs(entry["question"]) for entry in load_questions()]
