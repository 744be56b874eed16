"""The reward adapter and the policy that it prefers, both trained by `serve.py train`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from demo.lora import BASE_NAME, RANK, write_card
from demo.preferences import write_pairs, write_prompts

ROOT = Path(__file__).parent.parent
NUM_PAIRS, NUM_HELD_OUT_PAIRS = 4000, 200
NUM_PROMPTS, NUM_HELD_OUT_PROMPTS = 4000, 64
POLICY_STEPS = 240
SHARED_FLAGS = ("--rank", str(RANK), "--alpha", str(RANK), "--dropout", "0", "--batch-size", "16")


def train_reward(model: Path, adapters: Path, build: Path, share: float) -> None:
    """Bradley-Terry on right and wrong answers, from what guanaco knows."""
    data, held_out = build / "pairs.jsonl", build / "held-out-pairs.jsonl"
    write_pairs(data, int(NUM_PAIRS * share), seed=1)
    write_pairs(held_out, max(16, int(NUM_HELD_OUT_PAIRS * share)), seed=2)
    flags = ["--method", "reward", "--learning-rate", "5e-4", "--num-epochs", "1"]
    flags += ["--validation-file", str(held_out)]
    _train(model, adapters, data, build / "reward", flags)
    _install(build / "reward" / "final", adapters / "reward")


def train_policy(model: Path, adapters: Path, build: Path, share: float) -> None:
    """GRPO: guanaco learns to give the answers that the reward adapter prefers."""
    data, held_out = build / "prompts.jsonl", build / "held-out-prompts.jsonl"
    write_prompts(data, max(32, int(NUM_PROMPTS * share)), seed=3)
    write_prompts(held_out, max(8, int(NUM_HELD_OUT_PROMPTS * share)), seed=4)
    # At a higher temperature than it will be used with, it makes the mistakes to learn from.
    flags = ["--method", "grpo", "--temperature", "1.5", "--num-generations", "8"]
    flags += ["--learning-rate", "6e-4", "--lr-schedule", "linear", "--max-completion-tokens", "60"]
    flags += ["--reward-adapter", str(adapters / "reward"), "--validation-file", str(held_out)]
    flags += ["--max-steps", str(max(1, int(POLICY_STEPS * share)))]
    _train(model, adapters, data, build / "policy", flags)
    _install(build / "policy" / "final", adapters / "policy")


def _train(model: Path, adapters: Path, data: Path, output: Path, flags: list[str]) -> None:
    """One run of `serve.py train`, from nothing: an earlier job there would be gone on with."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "serve.py", "train", "--base", str(model), "--data", str(data)]
    command += ["--start-from", str(adapters / "guanaco"), "--output", str(output)]
    subprocess.run([*command, *SHARED_FLAGS, *flags], cwd=ROOT, check=True)


def _install(final: Path, target: Path) -> None:
    """Copy an adapter into the demo: bf16, without the trainer's state, with a card."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    config = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_NAME
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with safe_open(final / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, target / "adapter_model.safetensors", metadata=file.metadata())
    shutil.copyfile(final / "chat_template.jinja", target / "chat_template.jinja")
    write_card(target)
