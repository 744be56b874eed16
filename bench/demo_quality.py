"""How well the embedded demo answers: 60 held-out questions through the API, judged by keywords.

Run      python -m bench.demo_quality                  starts Herd with the demo, asks, stops it
         python -m bench.demo_quality --base-url URL   asks a server that is running
Writes   bench/results/demo_quality.json
Judging  demo/held_out.py: every keyword must stand in the answer. Temperature 0, one question a
         conversation.
Exit     0 when at least the required share is right (--require, 0.8), else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tqdm import tqdm

from demo.held_out import is_right, load_questions

ROOT = Path(__file__).parent.parent
RESULT_FILE = ROOT / "bench" / "results" / "demo_quality.json"
START_TIMEOUT_S = 120


@contextmanager
def own_server() -> Iterator[str]:
    """Herd with the embedded demo on a free port; yields its URL and stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(
                f"serve.py ended with status {process.returncode}; see its message above"
            )
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"{url} was not ready within {START_TIMEOUT_S} s")


def ask(client: httpx.Client, model: str, question: str) -> str:
    """The answer of a fresh conversation at temperature 0."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 100,
    }
    response = client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise SystemExit(f"{response.url} answered {response.status_code}: {response.text[:500]}")
    return response.json()["choices"][0]["message"]["content"]


def judge(client: httpx.Client, model: str) -> list[dict]:
    """Every question with its answer and the verdict."""
    rows = []
    for entry in tqdm(load_questions(), desc="questions", unit=""):
        answer = ask(client, model, entry["question"])
        rows.append({**entry, "answer": answer, "right": is_right(answer, entry["keywords"])})
    return rows


def print_table(rows: list[dict]) -> None:
    """Verdict, question and answer, a line each."""
    width = max(len(row["question"]) for row in rows)
    for row in rows:
        mark = "right" if row["right"] else "WRONG"
        answer = " ".join(row["answer"].split())
        print(f"{mark}  {row['question']:<{width}}  {answer[:90]}")


def main() -> int:
    """Ask, print, write the result; the exit status says whether enough was right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", help="a running server; by default one is started")
    parser.add_argument("--model", default="guanaco", help="adapter to ask (default: guanaco)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="if needed")
    parser.add_argument("--require", type=float, default=0.8, help="share that must be right (0.8)")
    arguments = parser.parse_args()
    if arguments.base_url:
        return run(arguments.base_url, arguments)
    with own_server() as url:
        return run(url, arguments)


def run(base_url: str, arguments: argparse.Namespace) -> int:
    """Judge one server and record the result."""
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    started_s = time.monotonic()
    with httpx.Client(base_url=base_url, headers=headers, timeout=120) as client:
        rows = judge(client, arguments.model)
    num_right = sum(row["right"] for row in rows)
    result = {
        "model": arguments.model,
        "num_questions": len(rows),
        "num_right": num_right,
        "share": round(num_right / len(rows), 4),
        "took_s": round(time.monotonic() - started_s, 1),
        "answers": rows,
    }
    RESULT_FILE.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    RESULT_FILE.write_text(text, encoding="utf-8")
    print_table(rows)
    print(f"\n{arguments.model}: {num_right} of {len(rows)} right; written to {RESULT_FILE}")
    return 0 if num_right >= arguments.require * len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
