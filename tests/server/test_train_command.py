"""serve.py train on the embedded demo base: results, refusals, and an interruption."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import serve
from adapters.format import inspect_adapter, read_adapter
from engine.model_config import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
SPEC = ModelSpec.from_folder(ROOT / "demo" / "model")
SMALL = ("--rank", "4", "--batch-size", "4", "--micro-batch-tokens", "256", "--threads", "1")
TIMEOUT_S = 120


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of small files of data, by kind."""
    folder = tmp_path_factory.mktemp("data")
    answers = [
        {"instruction": f"What is {i}?", "output": f"It is the number {i}."} for i in range(24)
    ]
    pairs = [
        {"prompt": f"What is {i}?", "chosen": f"The number {i}.", "rejected": "No."}
        for i in range(12)
    ]
    return {
        "answers": write_lines(folder / "answers.jsonl", answers),
        "held_out": write_lines(folder / "held_out.jsonl", answers[:6]),
        "pairs": write_lines(folder / "pairs.jsonl", pairs),
        "prompts": write_lines(
            folder / "prompts.jsonl", [{"prompt": pair["prompt"]} for pair in pairs]
        ),
        "broken": write_lines(folder / "broken.jsonl", [answers[0], {"nothing": 1}]),
    }


def train(*flags: str) -> int:
    return serve.main(["train", *flags, *SMALL])


def test_an_adapter_is_trained_saved_and_can_be_served(files, tmp_path, capsys):
    output = tmp_path / "mine"
    flags = ("--data", files["answers"], "--validation-file", files["held_out"])
    assert train(*flags, "--output", str(output), "--max-steps", "4") == 0
    shown = capsys.readouterr()
    assert "24 samples, format alpaca" in shown.out
    assert f"--adapter mine={output / 'final'}" in shown.out
    assert "the best so far" in shown.err
    info = inspect_adapter(output / "final", SPEC)
    assert info.rank == 4 and info.fingerprint is not None
    assert "### Human" in info.chat_template  # what it was trained with
    assert read_adapter(output / "final", SPEC).modules


def test_a_policy_is_trained_against_a_reward_adapter_that_was_trained_here(
    files, tmp_path, capsys
):
    reward, policy = tmp_path / "reward", tmp_path / "policy"
    flags = ("--method", "reward", "--data", files["pairs"], "--max-steps", "2")
    assert train(*flags, "--output", str(reward)) == 0
    assert inspect_adapter(reward / "final", SPEC).has_score_head
    flags = (
        "--method", "grpo", "--data", files["prompts"], "--reward-adapter", str(reward / "final"),
        "--num-generations", "3", "--max-completion-tokens", "6", "--max-steps", "2",
    )  # fmt: skip
    assert train(*flags, "--output", str(policy)) == 0
    assert "reward=" in capsys.readouterr().err
    assert read_adapter(policy / "final", SPEC).modules


def test_dpo_stays_close_to_the_adapter_that_it_starts_from(files, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--data", files["answers"], "--max-steps", "3", "--learning-rate", "0.01")
    assert train(*flags, "--output", str(first)) == 0
    flags = ("--method", "dpo", "--data", files["pairs"], "--max-steps", "1")
    assert train(*flags, "--start-from", str(first / "final"), "--output", str(second)) == 0
    assert "train_loss=0.6931" in capsys.readouterr().err  # log 2: both are the same


def test_every_problem_of_both_files_is_told_before_anything_is_loaded(files, tmp_path, capsys):
    flags = ("--data", files["broken"], "--validation-file", files["pairs"])
    assert train(*flags, "--output", str(tmp_path / "out")) == 1
    shown = capsys.readouterr().err
    assert "broken.jsonl" in shown and "line 2" in shown
    assert "pairs.jsonl" in shown and "method" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--data: expected a file"),
        (("--data", "x"), "--output: expected a folder"),
        (("--data", "x", "--output", "{out}", "--rank", "0"), "rank: expected a positive"),
        (("--data", "missing", "--output", "{out}"), "missing"),
        (("--data", "x", "--output", "{out}", "--start-from", "nobody"), "nobody"),
        (("--data", "x", "--output", "{out}", "--kl-coefficient", "1"), "only the method grpo"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path, capsys, flags, message):
    out = str(tmp_path / "out")
    assert serve.main(["train", *(flag.format(out=out) for flag in flags)]) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(files, tmp_path, capsys):
    common = ("--data", files["answers"], "--max-steps", "16", "--save-every-steps", "16")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(*common, "--output", str(whole)) == 0
    process = subprocess.Popen(
        [sys.executable, "serve.py", "train", *common, "--output", str(cut), *SMALL],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = ""
    while not re.search(r"\b[1-9]/16", seen):
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, out
    stopped_at = int(re.search(r"Stopped after step (\d+)", out)[1])
    assert 1 <= stopped_at < 16 and (cut / f"checkpoint-{stopped_at}").is_dir()
    capsys.readouterr()
    assert train(*common, "--output", str(cut)) == 0
    assert f"Going on from checkpoint-{stopped_at}" in capsys.readouterr().err
    first, second = (
        load_file(folder / "final" / "adapter_model.safetensors") for folder in (whole, cut)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_jobs_folder_is_not_mixed_with_this_one(files, tmp_path, capsys):
    flags = ("--data", files["answers"], "--output", str(tmp_path / "out"), "--max-steps", "2")
    assert train(*flags) == 0
    assert train(*flags, "--learning-rate", "1e-3") == 1
    assert "learning_rate was 0.0002 and is now 0.001" in capsys.readouterr().err
