"""The questions that judge the demo are well formed, and held out of its training."""

import random

import pytest

from demo.corpus import chat, documents
from demo.held_out import (
    MAX_OVERLAP,
    is_right,
    is_too_close,
    load_questions,
    overlap,
    words,
)
from demo.knowledge import exchange
from demo.train import SEED

QUESTIONS = load_questions()


def test_there_are_sixty_different_questions_with_keywords():
    assert len(QUESTIONS) == 60
    assert len({tuple(words(entry["question"])) for entry in QUESTIONS}) == 60
    for entry in QUESTIONS:
        assert entry.keys() == {"question", "keywords"}
        assert entry["keywords"]
        assert all(word.strip() for keyword in entry["keywords"] for word in keyword.split("|"))


def test_no_question_gives_its_own_answer_away():
    # A model that repeats the question must not be judged right.
    echoed = [q["question"] for q in QUESTIONS if is_right(q["question"], q["keywords"])]
    assert set(echoed) <= {"A very good morning to you!"}  # the fitting answer is the same greeting


def test_questions_are_phrased_differently_from_the_training_text():
    rng = random.Random(SEED)
    asked = {exchange(rng).question for _ in range(4_000)}
    for entry in QUESTIONS:
        closest = max(asked, key=lambda text: overlap(entry["question"], text))
        assert overlap(entry["question"], closest) <= MAX_OVERLAP, (entry["question"], closest)


def test_no_question_stands_verbatim_in_the_training_text():
    rng = random.Random(SEED)
    texts = [documents(rng) for _ in range(2_000)]
    texts += [chat(rng, style).text for style in ("guanaco", "pirate") for _ in range(1_000)]
    corpus = " ".join(" ".join(words(text)) for text in texts)
    found = [q["question"] for q in QUESTIONS if f" {' '.join(words(q['question']))} " in corpus]
    assert not found


def test_a_question_is_too_close_to_itself_in_any_case_and_punctuation():
    assert all(is_too_close(entry["question"]) for entry in QUESTIONS)
    assert all(is_too_close(entry["question"].upper() + "!!") for entry in QUESTIONS)
    assert not is_too_close("What is the capital of Denmark?")


@pytest.mark.parametrize(
    ("answer", "keywords", "expected"),
    [
        ("The capital is PARIS.", ["paris"], True),
        ("3 plus 4 is 7.", ["7|seven"], True),
        ("It is seventy.", ["7|seven"], False),  # whole words only
        ("It is 17.", ["7"], False),
        ("keys and values", ["key|keys", "value|values"], True),
        ("keys only", ["key|keys", "value|values"], False),
        ("It uses low-rank matrices.", ["low-rank"], True),
        ("", ["x"], False),
    ],
)
def test_an_answer_is_right_when_every_keyword_stands_in_it(answer, keywords, expected):
    assert is_right(answer, keywords) is expected
