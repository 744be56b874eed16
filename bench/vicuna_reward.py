"""A real run: a reward adapter on the embedded demo base, from verdicts on the Vicuna benchmark.

Run      python -m bench.vicuna_reward --source ../shared/data/vicuna
Writes   bench/results/vicuna_reward.json: accuracy on pairs about questions that training has not
         seen, and what always preferring the longer answer would get.
Caution  the demo base has five million parameters and was made to speak about itself. The figure
         shows that the trainer learns from real data, not how good a reward model can be.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.vicuna_preferences import preferences

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "vicuna_reward.json"
MAX_CHARS = 2100
"""Of an answer: the demo base holds 1,024 tokens."""
SETTINGS = {"rank": 16, "learning-rate": 1e-3, "num-epochs": 2, "eval-every-steps": 22}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the Vicuna set")
    source = parser.parse_args().source
    parts = preferences(source, share=0.2, seed=0, max_chars=MAX_CHARS, all_verdicts=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, records in parts.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        started_s = time.perf_counter()
        subprocess.run([*command(folder), "--output", str(folder / "job")], cwd=ROOT, check=True)
        elapsed_s = time.perf_counter() - started_s
        evaluations = [
            read_evaluation(path)
            for path in (folder / "job").glob("checkpoint-*/trainer_state.json")
        ]
    evaluations.sort(key=lambda evaluation: evaluation["step"])
    result = {
        "what": "reward adapter on the demo base (five million parameters); not a measure of "
        "how good a reward model can be",
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}",
        "settings": SETTINGS,
        "train_pairs": len(parts["train"]),
        "held_out_pairs": len(parts["held_out"]),
        "held_out_accuracy": evaluations[-1]["accuracy"],
        "held_out_accuracy_of_the_longer_answer": longer_wins(parts["held_out"]),
        "evaluations": evaluations,
        "seconds": round(elapsed_s),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def command(folder: Path) -> list[str]:
    """serve.py train with the settings above; every evaluated checkpoint stays on disk."""
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    return [
        sys.executable, "serve.py", "train", "--base", "demo", "--method", "reward",
        "--data", str(folder / "train.jsonl"),
        "--validation-file", str(folder / "held_out.jsonl"),
        "--save-every-steps", str(SETTINGS["eval-every-steps"]), "--keep-checkpoints", "100",
        *flags,
    ]  # fmt: skip


def read_evaluation(path: Path) -> dict[str, Any]:
    """Step, loss and accuracy on the held-out pairs, as a checkpoint has them."""
    state = json.loads(path.read_text(encoding="utf-8"))["state"]
    metrics = dict(state["metrics"])
    return {
        "step": state["step"],
        "loss": metrics["valid_loss"],
        "accuracy": metrics["valid_accuracy"],
    }


def longer_wins(records: list[dict[str, Any]]) -> float:
    """Share of pairs whose better answer is the longer one."""
    wins = 0
    for record in records:
        better, worse = (
            len(record[name][0]["content"]) for name in ("preferred_output", "non_preferred_output")
        )
        wins += better > worse
    return wins / len(records)


if __name__ == "__main__":
    main()
