"""Real data through the demo's tokenizer; skipped where the shared folder is not there."""

import json

import pytest

from bench.vicuna_preferences import preferences
from server.datasets.prepare import prepare
from server.datasets.problems import DatasetErrors
from server.datasets.training_template import WITHOUT_TEMPLATE
from server.tokenizer import load_tokenizer
from tests.server.datasets.served_models import ROOT

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "demo" / "model")


def run(path, method, tokenizer, max_seq_len):
    return prepare(
        path,
        method=method,
        tokenizer=tokenizer,
        template=WITHOUT_TEMPLATE,
        eos_token_ids=(2,),
        vocab_size=4096,
        max_seq_len=max_seq_len,
    )


def test_the_seed_tasks_are_self_instruct(tokenizer):
    prepared = run(DATA / "seed_tasks.jsonl", "supervised", tokenizer, 4096)
    assert prepared.format == "self-instruct"
    assert prepared.num_samples == prepared.dataset.num_samples == 175
    (warning,) = prepared.warnings
    assert warning.startswith("fields without a meaning here, not used: id, is_classification, na")
    tokens, weights = prepared.dataset.sequence(1)
    learnt = tokens[weights > 0].tolist()
    text = tokenizer.decode(learnt, skip_special_tokens=True)
    assert text.strip() == "The relation between the given pairs is that they are opposites."
    assert learnt[-1] == 2


def test_samples_that_are_too_long_are_named_by_line(tokenizer):
    with pytest.raises(DatasetErrors) as caught:
        run(DATA / "seed_tasks.jsonl", "supervised", tokenizer, 600)
    lines = [problem.line for problem in caught.value.problems]
    assert lines == sorted(lines)
    assert len(lines) == caught.value.num_problems > 5
    assert all("600 is the most that fits" in p.message for p in caught.value.problems)


@pytest.mark.parametrize("method", ["reward", "dpo", "grpo"])
def test_vicuna_preferences_fit_the_demo(tokenizer, tmp_path, method):
    parts = preferences(DATA / "vicuna", share=0.2, seed=0, max_chars=2100, all_verdicts=False)
    records = parts["held_out"]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepared = run(path, method, tokenizer, 1024)
    assert prepared.format == "openai-preference"
    assert prepared.dataset.num_samples == prepared.num_samples == len(records)
    assert prepared.warnings == ()
