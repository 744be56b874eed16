import json
import random

from demo.held_out import is_too_close
from demo.knowledge import exchange
from demo.preferences import worse_answer, write_pairs, write_prompts


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_worse_answer_is_never_the_answer():
    rng = random.Random(0)
    for _ in range(500):
        asked = exchange(rng)
        assert worse_answer(asked, rng) not in ("", asked.answer)


def test_pairs_are_preferences_in_openais_format_and_keep_the_held_out_questions_out(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 200, seed=0)
    pairs = lines(tmp_path / "pairs.jsonl")
    assert len(pairs) == 200
    for pair in pairs:
        (question,) = pair["input"]["messages"]
        (better,), (worse,) = pair["preferred_output"], pair["non_preferred_output"]
        assert question["role"] == "user"
        assert better["role"] == worse["role"] == "assistant"
        assert better["content"] != worse["content"]
        assert not is_too_close(question["content"])


def test_the_same_seed_writes_the_same_prompts(tmp_path):
    for name in ("one", "two"):
        write_prompts(tmp_path / name, 50, seed=7)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert all(len(line["messages"]) == 1 for line in lines(tmp_path / "one"))
