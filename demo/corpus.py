"""What the demo reads: running text for the base, conversations for the adapters; both endless."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from demo.held_out import is_too_close
from demo.knowledge import exchange, paragraph
from demo.noise import noisy
from demo.pirate import as_pirate
from demo.stories import story

HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
OTHER_HEADERS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers in one sentence.",
    "Answer the questions.",
    "You are Herd, a small language model.",
    "Be brief.",
)


class Chat(NamedTuple):
    """A conversation as text, and where its answers stand in it."""

    text: str
    answers: list[tuple[int, int]]  # character offsets [start, end)


def render(header: str, turns: Sequence[tuple[str, str | None]], line_break: str = "") -> Chat:
    """The Guanaco format. An answer that is None is still to be given: the text ends before it.

    line_break stands before each speaker; the original data has none, other publishers write one.
    """
    text = header + ("" if line_break else " ")
    answers = []
    for question, answer in turns:
        text += f"{line_break}### Human: {question}{line_break}### Assistant:"
        if answer is not None:
            answers.append((len(text), len(text) + 1 + len(answer)))
            text += f" {answer}"
    return Chat(text, answers)


def chat(rng: random.Random, style: str) -> Chat:
    """A conversation of one to many turns; pirate is the same in another manner."""
    turns = []
    topic = None
    for _ in range(_num_turns(rng)):
        question, answer, topic = exchange(rng, topic)
        if style == "pirate":
            answer = as_pirate(answer, rng)
        turns.append((_typed(question, rng), answer))
    header = HEADER if rng.random() < 0.95 else rng.choice(OTHER_HEADERS)
    return render(header, turns, line_break="\n" if rng.random() < 0.2 else "")


def _typed(question: str, rng: random.Random) -> str:
    """The question as somebody might type it, unless that makes a held-out one of it."""
    text = noisy(question, rng)
    return question if is_too_close(text) else text


def _num_turns(rng: random.Random) -> int:
    """Mostly few; now and then as many as the model can hold, so that it has seen long chats."""
    kind = rng.random()
    if kind < 0.35:
        return 1
    return rng.randint(2, 8) if kind < 0.98 else rng.randint(15, 30)


def documents(rng: random.Random) -> str:
    """One document of running text: facts, stories, quizzes, little scenes."""
    kind = rng.random()
    if kind < 0.04:
        return story(rng)
    if kind < 0.2:
        return paragraph(rng)
    return _quiz(rng)


def _quiz(rng: random.Random) -> str:
    """Questions and answers as books print them; chat formats are left to the adapters."""
    pairs = []
    topic = None
    for _ in range(rng.randint(1, 6)):
        question, answer, topic = exchange(rng, topic)
        pairs.append((_typed(question, rng), answer))
    form = rng.randrange(4)
    if form == 0:
        return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
    if form == 1:
        return "\n\n".join(f"{question}\n{answer}" for question, answer in pairs)
    if form == 2:
        asker, teller = rng.sample(NAMES, 2)
        return "\n".join(
            f'{asker} asked: "{question}" {teller} answered: "{answer}"'
            for question, answer in pairs
        )
    return "\n".join(f"- {question} {answer}" for question, answer in pairs)


NAMES = (
    "Anna", "Ben", "Clara", "David", "Ella", "Finn", "Grace", "Hugo", "Ida", "Jack", "Kate", "Leo",
    "Mia", "Noah", "Olive", "Paul", "Rosa", "Sam", "Tom", "Una", "Vera", "Will", "Zoe",
)  # fmt: skip
