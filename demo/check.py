"""Ask the trained demo the held-out questions without a server: transformers and peft, greedily."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from demo.corpus import HEADER, render
from demo.held_out import is_right, load_questions
from demo.lora import load_frozen_base

logger = logging.getLogger("demo")


class Judged(NamedTuple):
    """One question, what the model said and whether the keywords are in it."""

    question: str
    answer: str
    right: bool


@torch.inference_mode()
def answers_to(model_folder: Path, adapter_folder: Path, questions: list[str]) -> list[str]:
    """Greedy answers, each question in a conversation of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(load_frozen_base(model_folder), adapter_folder).eval()
    answers = []
    for question in questions:
        ids = tokenizer(render(HEADER, [(question, None)]).text, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=80, do_sample=False, pad_token_id=2)
        new = output[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def answer_all(model_folder: Path, adapter_folder: Path) -> list[Judged]:
    """The held-out questions, judged by their keywords."""
    entries = load_questions()
    answers = answers_to(model_folder, adapter_folder, [entry["question"] for entry in entries])
    return [
        Judged(entry["question"], answer, is_right(answer, entry["keywords"]))
        for entry, answer in zip(entries, answers, strict=True)
    ]


def report(name: str, judged: list[Judged]) -> None:
    """Every answer, and how many are right."""
    for question, answer, right in judged:
        logger.info("%s %s | %s", "right" if right else "WRONG", question, answer)
    num_right = sum(entry.right for entry in judged)
    logger.info("%s: %d of %d held-out questions right", name, num_right, len(judged))
