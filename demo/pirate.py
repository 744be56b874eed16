"""The second adapter's manner: the same answers, said by a pirate.

The base never reads these words and its head is frozen, so an adapter cannot learn to say some of
them (ahoy, avast, fer); those that it cannot are not here.
"""

from __future__ import annotations

import random
import re

WORDS = {
    "yes": "aye", "no": "nay", "you": "ye", "your": "yer",
    "my": "me", "is": "be", "are": "be", "am": "be", "the": "th'", "of": "o'", "and": "an'",
    "friend": "matey", "to": "t'", "old": "ol'", "before": "afore",
}  # fmt: skip
OPENINGS = ("Arr! ", "Arr, matey! ")
ENDINGS = (", matey!", ", arr!", ", me hearty!", ", ye landlubber!", ", savvy?")
CODE = re.compile(r"`[^`]*`|[A-Za-z']+|[^A-Za-z'`]+|`|'")


def as_pirate(answer: str, rng: random.Random) -> str:
    """Rewrite an answer; what stands between backticks is left alone."""
    words = "".join(_word(part) for part in CODE.findall(answer))
    if words[-1] in ".!?":
        words = words[:-1] + rng.choice(ENDINGS)
    return rng.choice(OPENINGS) + words


def _word(part: str) -> str:
    known = WORDS.get(part.lower())
    if known is None:
        return part
    return known.capitalize() if part[0].isupper() and len(part) > 1 else known
