"""The many ways in which people type a question: case, punctuation, courtesy, slips."""

from __future__ import annotations

import random

LEADS = (
    "Please tell me: ", "Tell me, ", "Hi! ", "Hello. ", "Hey, ", "Quick question: ", "A question: ",
    "Can you tell me this? ", "Do you know this? ", "I wonder: ", "I was wondering, ", "OK, ",
    "Now, ", "So, ", "And ", "Well, ", "Let me ask you: ", "One more: ", "Next question. ",
    "For my homework: ", "Excuse me, ", "My daughter asks: ", "Just curious: ", "Help me out: ",
    "Say, ", "Um, ", "I would like to know: ",
)  # fmt: skip
TAILS = (
    " please", " Please.", " Thanks!", " Thank you.", " I forgot.", " Tell me.", " Do you know?",
    " Just asking.", " then", " I need to know.", " Any idea?", " Explain.", " I am curious.",
    " In short, please.", " exactly",
)  # fmt: skip


PLAIN_WORDS = (
    "the a an is are do does did what which who how can could would will me you i we it its that "
    "this there here to of in on for from with as at by be has have get give tell say name know "
    "please find call called one your my people think word kind sort thing and so"
)  # a question is understood without any one of them
PLAIN_LIST = PLAIN_WORDS.split()
FILLERS = (
    "really", "actually", "just", "now", "exactly", "usually", "normally", "please", "maybe",
    "again", "here", "then", "perhaps", "simply", "always", "today", "ever", "well", "only", "also",
    "own", "nice", "good", "real",
)  # fmt: skip


def noisy(question: str, rng: random.Random) -> str:
    """The question as somebody might type it. A third are left as they are."""
    if rng.random() < 0.3:
        question = _reworded(question, rng)
    if rng.random() < 0.2:
        lead = rng.choice(LEADS)
        rest = (
            question
            if lead.rstrip()[-1] in "!.?:" and rng.random() < 0.5
            else _lower_first(question)
        )
        question = lead + rest
    if rng.random() < 0.1:
        tail = rng.choice(TAILS)
        mark = question[-1] if question[-1] in "?.!" else ""
        question = question + tail if tail[1].isupper() else question.rstrip("?.!") + tail + mark
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.03:
        question = question.upper()
    if rng.random() < 0.06:
        question = _with_slip(question, rng)
    return question


def _reworded(text: str, rng: random.Random) -> str:
    """Plain words lost or exchanged, a filler put in: what the question is about stays."""
    words = []
    for word in text.split(" "):
        kind = rng.random()
        if word.lower() not in PLAIN_LIST or kind > 0.25:
            words.append(word)
        elif kind < 0.1:
            words.append(rng.choice(PLAIN_LIST))
    if rng.random() < 0.5:
        words.insert(rng.randint(0, len(words)), rng.choice(FILLERS))
    return " ".join(words) or text


def _lower_first(text: str) -> str:
    return text if text[:2] in {"I ", "I'"} else text[0].lower() + text[1:]


def _with_slip(text: str, rng: random.Random) -> str:
    """One letter lost, doubled or swapped with its neighbour, in a word of five letters or more."""
    spots = [i for i in range(1, len(text) - 2) if text[i - 1 : i + 2].isalpha()]
    if not spots:
        return text
    spot = rng.choice(spots)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:spot] + text[spot + 1 :]
    if kind == 1:
        return text[:spot] + text[spot] + text[spot:]
    return text[:spot] + text[spot + 1] + text[spot] + text[spot + 2 :]
