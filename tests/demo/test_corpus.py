"""What the demo is trained on: facts that are true, in text that is clean."""

import random
import re

import pytest

from demo.corpus import HEADER, chat, documents, render
from demo.facts_number import DAYS, MONTHS
from demo.grammar import Topic, count, expand
from demo.knowledge import TOPICS, exchange, paragraph
from demo.noise import noisy
from demo.pirate import as_pirate
from demo.stories import story

SUM = re.compile(r"(\d+) (plus|minus|times|divided by) (\d+) is (\d+)\.")
COMPUTE = {
    "plus": lambda a, b: a + b,
    "minus": lambda a, b: a - b,
    "times": lambda a, b: a * b,
    "divided by": lambda a, b: a // b if a % b == 0 else None,
}


def exchanges(num, seed=0):
    rng = random.Random(seed)
    return [exchange(rng) for _ in range(num)]


def test_a_choice_stands_for_each_of_its_alternatives():
    rng = random.Random(0)
    pattern = "[What is|What's] the [big |]capital of {0}?"
    found = {expand(pattern, ("France",), rng) for _ in range(100)}
    assert found == {
        "What is the capital of France?",
        "What is the big capital of France?",
        "What's the capital of France?",
        "What's the big capital of France?",
    }
    assert count(pattern) == 4


def test_choices_may_be_nested_and_articles_fit():
    assert expand("[a [b|b]|a b] a {0}", ("owl",), random.Random(0)) == "a b an owl"
    assert expand("{A0} sees a {0}.", ("ant",), random.Random(0)) == "Ant sees an ant."


def test_a_pattern_with_a_lonely_bracket_is_refused():
    with pytest.raises(ValueError, match=r"pattern: expected choices"):
        expand("[What is it?", (), random.Random(0))


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.answer[:40])
def test_every_pattern_of_a_topic_makes_a_clean_sentence(topic: Topic):
    rng = random.Random(0)
    for pattern in (*topic.questions, topic.answer, *topic.statements, *topic.follow_ups):
        for row in rng.sample(topic.rows, min(5, len(topic.rows))):
            text = expand(pattern, row, rng)
            assert text
            assert not re.search(r"[\[\]{}|]|  | a [aeiou](?!ne)", text), text


def test_facts_are_asked_for_in_many_ways():
    phrasings = sorted(sum(map(count, topic.questions)) for topic in TOPICS)
    assert phrasings[0] >= 3
    assert phrasings[len(phrasings) // 2] >= 20
    assert sum(count(q) * len(t.rows) for t in TOPICS for q in t.questions) > 100_000


def test_sums_are_right():
    checked = 0
    for _, answer, _ in exchanges(3_000):
        if match := SUM.fullmatch(answer):
            a, operation, b, result = match.groups()
            assert COMPUTE[operation](int(a), int(b)) == int(result), answer
            checked += 1
    assert checked > 300


def test_days_and_months_follow_each_other():
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for _, answer, _ in exchanges(3_000):
            match = re.fullmatch(rf"The {unit} (after|before) (\w+) is (\w+)\.", answer)
            if match:
                step = 1 if match[1] == "after" else -1
                assert names[(names.index(match[2]) + step) % len(names)] == match[3]


def test_a_story_is_about_the_hero_that_was_asked_for():
    assert "fox" in story(random.Random(0), "fox")
    assert len(story(random.Random(0)).split(". ")) >= 4


def test_the_same_seed_gives_the_same_text():
    assert [documents(random.Random(3)) for _ in range(5)] == [
        documents(random.Random(3)) for _ in range(5)
    ]
    assert chat(random.Random(3), "guanaco") == chat(random.Random(3), "guanaco")


def test_running_text_holds_no_chat_format():
    rng = random.Random(0)
    assert not any("###" in documents(rng) for _ in range(500))
    assert paragraph(rng)


def test_answers_stand_where_the_conversation_says():
    conversation = render(HEADER, [("Hi", "Hello!"), ("And?", None)])
    assert conversation.text == (
        f"{HEADER} ### Human: Hi### Assistant: Hello!### Human: And?### Assistant:"
    )
    assert [conversation.text[a:b] for a, b in conversation.answers] == [" Hello!"]
    broken = render("Be brief.", [("Hi", "Hello!")], line_break="\n")
    assert broken.text == "Be brief.\n### Human: Hi\n### Assistant: Hello!"


def test_a_question_survives_noise_recognisably():
    rng = random.Random(0)
    texts = [noisy("What is the capital of France?", rng) for _ in range(300)]
    assert texts.count("What is the capital of France?") > 60
    assert sum("france" in text.lower() for text in texts) > 270
    assert len(set(texts)) > 60


def test_a_pirate_says_the_same_in_another_manner():
    answer = as_pirate("Type `make serve`: it is the way to start.", random.Random(0))
    assert "`make serve`" in answer
    assert " be th' way t' start" in answer
    assert answer != as_pirate("Type `make serve`: it is the way to start.", random.Random(1))
