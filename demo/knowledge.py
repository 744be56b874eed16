"""Draws questions with answers, and paragraphs, from all the facts; keeps what is held out away."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

from demo import facts_herd, facts_number, facts_talk, facts_world
from demo.grammar import Topic, expand
from demo.held_out import is_too_close
from demo.stories import story_exchange

TOPICS: tuple[Topic, ...] = (
    *facts_world.TOPICS,
    *facts_number.TOPICS,
    *facts_herd.TOPICS,
    *facts_talk.TOPICS,
    facts_talk.UNKNOWN,
)
WEIGHTS = [topic.weight for topic in TOPICS]
STORY_SHARE = 0.02
LARGE_SUM_SHARE = 0.005
FOLLOW_UP_SHARE = 0.2

_is_too_close = lru_cache(maxsize=200_000)(is_too_close)


class Exchange(NamedTuple):
    """A question and its answer, and the topic that they came from."""

    question: str
    answer: str
    topic: Topic | None


def exchange(rng: random.Random, previous: Topic | None = None) -> Exchange:
    """A question that is not held out, and its answer; at times it leans on the one before."""
    while True:
        drawn = _draw(rng, previous)
        if not _is_too_close(drawn.question):
            return drawn


def _draw(rng: random.Random, previous: Topic | None) -> Exchange:
    kind = rng.random()
    if previous is not None and previous.follow_ups and rng.random() < FOLLOW_UP_SHARE:
        return _ask(previous, previous.follow_ups, rng)
    if kind < STORY_SHARE:
        return Exchange(*story_exchange(rng), None)
    if kind < STORY_SHARE + LARGE_SUM_SHARE:
        return Exchange(*facts_talk.unknown_sum(rng), None)
    topic = rng.choices(TOPICS, WEIGHTS)[0]
    return _ask(topic, topic.questions, rng)


def _ask(topic: Topic, patterns: tuple[str, ...], rng: random.Random) -> Exchange:
    row = rng.choice(topic.rows)
    question = expand(rng.choice(patterns), row, rng)
    return Exchange(question, expand(topic.answer, row, rng), topic)


def paragraph(rng: random.Random) -> str:
    """Some facts of one topic, as a text states them."""
    topic = rng.choices(TOPICS, WEIGHTS)[0]
    forms = topic.statements or (topic.answer,)
    rows = rng.sample(topic.rows, min(len(topic.rows), rng.randint(2, 8)))
    return " ".join(expand(rng.choice(forms), row, rng) for row in rows)
