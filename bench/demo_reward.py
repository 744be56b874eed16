"""What the demo's reward adapter thinks of the answers of guanaco and of the policy.

Run      python -m bench.demo_reward                  starts Herd with the demo, asks, stops it
         python -m bench.demo_reward --base-url URL   asks a server that is running
Writes   bench/results/demo_reward.json
Method   the 60 questions of bench.demo_quality, --samples answers of each model at temperature 1,
         the same seeds for both, every answer scored through /v1/rewards. The margin's error is
         that of the mean over questions of (policy - guanaco).
Exit     0 when the policy's mean reward is the higher one, else 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from bench.demo_quality import ROOT, own_server
from bench.overhead import cpu_name, git_commit
from demo.held_out import is_right, load_questions

RESULT_FILE = ROOT / "bench" / "results" / "demo_reward.json"


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """The answer's JSON."""
    response = client.post(path, json=body)
    if response.status_code != 200:
        raise SystemExit(f"{response.url} answered {response.status_code}: {response.text[:500]}")
    return response.json()


def rewards_of(client: httpx.Client, model: str, options: argparse.Namespace) -> list[dict]:
    """Per question: the mean reward of the answers, and the share that is right."""
    rows = []
    for entry in tqdm(load_questions(), desc=model, unit="question"):
        question = {"role": "user", "content": entry["question"]}
        body = {"model": model, "messages": [question], "n": options.samples, "max_tokens": 60}
        choices = post(client, "/v1/chat/completions", {**body, "temperature": 1.0, "seed": 1})
        answers = [choice["message"]["content"] for choice in choices["choices"]]
        talks = [[question, {"role": "assistant", "content": answer}] for answer in answers]
        scored = post(client, "/v1/rewards", {"model": options.reward_adapter, "input": talks})
        rewards = [row["data"][0] for row in scored["data"]]
        right = [is_right(answer, entry["keywords"]) for answer in answers]
        rows.append({"reward": statistics.mean(rewards), "right": statistics.mean(right)})
    return rows


def main() -> int:
    """Ask, score, print, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", help="a running server; by default one is started")
    parser.add_argument("--baseline", default="guanaco")
    parser.add_argument("--policy", default="policy")
    parser.add_argument("--reward-adapter", default="reward")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    options = parser.parse_args()
    with (
        nullcontext(options.base_url) if options.base_url else own_server() as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        found = {
            model: rewards_of(client, model, options)
            for model in (options.baseline, options.policy)
        }
    pairs = zip(found[options.policy], found[options.baseline], strict=True)
    margins = [ours["reward"] - theirs["reward"] for ours, theirs in pairs]
    result = {
        "command": "python -m bench.demo_reward",
        "cpu": cpu_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "num_questions": len(margins),
        "samples": options.samples,
        "margin": round(statistics.mean(margins), 4),
        "margin_error": round(statistics.stdev(margins) / len(margins) ** 0.5, 4),
        "models": {
            model: {
                key: round(statistics.mean(row[key] for row in rows), 4)
                for key in ("reward", "right")
            }
            for model, rows in found.items()
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["margin"] > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
