"""The Vicuna benchmark's verdicts as preference data: pairs of answers, split by question.

Run      python -m bench.vicuna_preferences --source ../shared/data/vicuna --output build/vicuna
Writes   train.jsonl and held_out.jsonl in OpenAI's preference format; no question is in both. With
         the demo base, which holds 1,024 tokens: --max-chars 2100.
Source   QLoRA, arXiv:2305.14314, section 5: GPT-4 judged every pair of eight systems on 80
         questions, in both orders. It favours what it sees first (56 % first, 30 % second), so a
         pair is kept where both orders name the same winner; --all-verdicts keeps every verdict.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_lines(path: Path) -> list[Record]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def winners(judgments: list[Record], all_verdicts: bool) -> list[tuple[int, str, str]]:
    """(question, better system, worse system), in a fixed order."""
    votes: dict[tuple[int, str, str], int] = defaultdict(int)
    for judgment in judgments:
        names = judgment["first"], judgment["second"]
        if judgment["verdict"] in ("first", "second"):
            better, worse = names if judgment["verdict"] == "first" else names[::-1]
            votes[judgment["question_id"], better, worse] += 1
    if all_verdicts:
        return sorted(pair for pair, count in votes.items() for _ in range(count))
    return sorted(pair for pair, count in votes.items() if count == 2)


def held_out_questions(questions: list[Record], share: float, seed: int) -> set[int]:
    """About this share of each category's questions, one at least."""
    by_category: dict[str, list[int]] = defaultdict(list)
    for question in questions:
        by_category[question["category"]].append(question["question_id"])
    rng = random.Random(seed)
    held_out: set[int] = set()
    for ids in by_category.values():
        held_out.update(rng.sample(sorted(ids), max(1, round(share * len(ids)))))
    return held_out


def preferences(
    folder: Path, *, share: float, seed: int, max_chars: int, all_verdicts: bool
) -> dict[str, list[Record]]:
    """Preference records of both parts, {"train": [...], "held_out": [...]}.

    Args:
        folder:       questions.jsonl, answers.jsonl, judgments.jsonl.
        share:        of the questions that are held out.
        seed:         chooses them.
        max_chars:    pairs with a longer answer are left out; 0: none is.
        all_verdicts: also where the other order's verdict differs.
    """
    questions = read_lines(folder / "questions.jsonl")
    texts = {entry["question_id"]: entry["text"] for entry in questions}
    answers = {
        (entry["question_id"], entry["system"]): entry["text"]
        for entry in read_lines(folder / "answers.jsonl")
    }
    held_out = held_out_questions(questions, share, seed)
    parts: dict[str, list[Record]] = {"train": [], "held_out": []}
    for question, better, worse in winners(read_lines(folder / "judgments.jsonl"), all_verdicts):
        chosen, rejected = answers[question, better], answers[question, worse]
        if chosen == rejected or (max_chars and max(len(chosen), len(rejected)) > max_chars):
            continue
        record = {
            "input": {"messages": [{"role": "user", "content": texts[question]}]},
            "preferred_output": [{"role": "assistant", "content": chosen}],
            "non_preferred_output": [{"role": "assistant", "content": rejected}],
        }
        parts["held_out" if question in held_out else "train"].append(record)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--share", type=float, default=0.2, help="held-out questions (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the held-out questions (0)")
    parser.add_argument("--max-chars", type=int, default=0, help="longest answer (0: any)")
    parser.add_argument("--all-verdicts", action="store_true", help="contradictory ones as well")
    arguments = parser.parse_args()
    parts = preferences(
        arguments.source,
        share=arguments.share,
        seed=arguments.seed,
        max_chars=arguments.max_chars,
        all_verdicts=arguments.all_verdicts,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        path = arguments.output / f"{name}.jsonl"
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")
        num_questions = len({record["input"]["messages"][0]["content"] for record in records})
        print(f"{path}: {len(records)} pairs, {num_questions} questions")


if __name__ == "__main__":
    main()
