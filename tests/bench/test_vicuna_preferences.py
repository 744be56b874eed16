"""Verdicts to preference pairs, split by question."""

import json
from pathlib import Path

import pytest

from bench.vicuna_preferences import held_out_questions, preferences

VICUNA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vicuna"
EVERYTHING = {"share": 0.5, "seed": 0, "max_chars": 0, "all_verdicts": False}


@pytest.fixture
def folder(tmp_path):
    """Two questions of one category; systems a and b, judged in both orders."""

    def write(name, records):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))

    questions = [{"question_id": q, "category": "generic", "text": f"Question {q}"} for q in (1, 2)]
    answers = [
        {"question_id": q, "system": s, "text": f"Answer of {s}" + "!" * (q * 10)}
        for q in (1, 2)
        for s in "ab"
    ]
    verdicts = [(1, "a", "b", "first"), (1, "b", "a", "second"), (2, "a", "b", "first")]
    verdicts += [(2, "b", "a", "first"), (2, "a", "b", "tie"), (2, "a", "b", "unparsed")]
    names = ("question_id", "first", "second", "verdict")
    write("questions.jsonl", questions)
    write("answers.jsonl", answers)
    write("judgments.jsonl", [dict(zip(names, verdict, strict=True)) for verdict in verdicts])
    return tmp_path


def pairs(parts):
    return [
        (part, record["input"]["messages"][0]["content"], record["preferred_output"][0]["content"])
        for part, records in parts.items()
        for record in records
    ]


def test_only_verdicts_that_both_orders_share_are_kept(folder):
    ((_, question, preferred),) = pairs(preferences(folder, **EVERYTHING))
    assert (question, preferred) == ("Question 1", "Answer of a" + "!" * 10)


def test_all_verdicts_can_be_asked_for(folder):
    found = pairs(preferences(folder, **{**EVERYTHING, "all_verdicts": True}))
    assert sorted(question for _, question, _ in found) == ["Question 1"] * 2 + ["Question 2"] * 2
    assert {preferred[:11] for _, question, preferred in found if question == "Question 2"} == {
        "Answer of a",
        "Answer of b",
    }


def test_long_answers_can_be_left_out(folder):
    limits = {**EVERYTHING, "all_verdicts": True, "max_chars": 25}
    assert {question for _, question, _ in pairs(preferences(folder, **limits))} == {"Question 1"}


def test_each_category_gives_its_share_of_questions():
    questions = [{"question_id": q, "category": "ab"[q % 2]} for q in range(20)]
    held_out = held_out_questions(questions, 0.2, seed=0)
    assert sorted(q % 2 for q in held_out) == [0, 0, 1, 1]
    assert held_out == held_out_questions(questions, 0.2, seed=0)
    assert held_out != held_out_questions(questions, 0.2, seed=1)


@pytest.mark.skipif(not VICUNA.is_dir(), reason=f"{VICUNA} is not there")
def test_no_question_is_in_both_parts_of_the_real_set():
    parts = preferences(VICUNA, share=0.2, seed=0, max_chars=0, all_verdicts=False)
    questions = {part: {q for p, q, _ in pairs(parts) if p == part} for part in parts}
    assert len(questions["train"]) == 64
    assert len(questions["held_out"]) == 16
    assert not questions["train"] & questions["held_out"]
    assert {part: len(records) for part, records in parts.items()} == {
        "train": 1008,
        "held_out": 264,
    }
