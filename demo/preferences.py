"""What the reward adapter learns from: right and wrong answers. And questions for the policy.

A worse answer states another row of the same table, answers another question, rambles on into one,
or stops too early. Nothing here is held out of the corpus that is not held out there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo.grammar import expand
from demo.knowledge import Exchange, exchange

WRONG, ELSEWHERE, RAMBLING = 0.6, 0.15, 0.15  # shares; the rest stops too early


def write_pairs(path: Path, count: int, seed: int) -> None:
    """Preferences as JSON Lines, in OpenAI's format."""
    rng = random.Random(seed)
    _write(path, (_pair(rng) for _ in range(count)))


def write_prompts(path: Path, count: int, seed: int) -> None:
    """Questions alone, a conversation each."""
    rng = random.Random(seed)
    _write(path, ({"messages": [_user(exchange(rng).question)]} for _ in range(count)))


def worse_answer(asked: Exchange, rng: random.Random) -> str:
    """An answer to the question that nobody wants; never the answer itself."""
    while True:
        answer = _worse(asked, rng)
        if answer != asked.answer:
            return answer


def _worse(asked: Exchange, rng: random.Random) -> str:
    kind = rng.random()
    if kind < WRONG and asked.topic is not None and len(asked.topic.rows) > 1:
        return expand(asked.topic.answer, rng.choice(asked.topic.rows), rng)
    if kind < WRONG + ELSEWHERE:
        return exchange(rng).answer
    if kind < WRONG + ELSEWHERE + RAMBLING:
        return f"{asked.answer} {exchange(rng).answer}"
    words = asked.answer.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _pair(rng: random.Random) -> dict[str, Any]:
    asked = exchange(rng)
    return {
        "input": {"messages": [_user(asked.question)]},
        "preferred_output": [_assistant(asked.answer)],
        "non_preferred_output": [_assistant(worse_answer(asked, rng))],
    }


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
