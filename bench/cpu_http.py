"""The demo as people meet it: `serve.py` started, asked through the HTTP API. Part of bench/cpu.py.

Run      python -m bench.cpu_http    (bench/cpu.py does); prints JSON
Method   start-up is from the command to /health saying ready. Speed is that of a streamed chat
         answer, from sending the question to its end; with several requests at once all their
         tokens count. Memory is that of both processes together, shared pages counted once.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx

from bench.cpu_load import TICKS_PER_S, busy_s, memory_row

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 120


def children(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += children(int(child))
    return found


def processor_s(pids: list[int]) -> float:
    """Processor seconds that these processes have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def connect(port: int) -> HTTPConnection:
    """A connection to a server on this machine, open."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.connect()
    return connection


def ask(connection: HTTPConnection, path: str, body: bytes) -> bytes:
    """One question over an open connection: the answer's bytes.

    The client shares the processors with the server, so it is as small as can be: whoever measures
    connects and writes the questions before the clock starts, and looks into the answers after.
    """
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {answer[:500]!r}")
    return answer


def ask_together(port: int, path: str, bodies: list[bytes]) -> tuple[float, list[bytes]]:
    """So many questions at once: (seconds from the first one to the last answer, the answers)."""
    connections = [connect(port) for _ in bodies]
    with ThreadPoolExecutor(len(bodies)) as threads:
        started = time.perf_counter()
        answers = list(threads.map(ask, connections, [path] * len(bodies), bodies))
        seconds = time.perf_counter() - started
    for connection in connections:
        connection.close()
    return seconds, answers


def question(model: str, max_tokens: int) -> bytes:
    """The body of a chat request whose answer is streamed."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me everything you know about llamas."}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def num_tokens(stream: bytes) -> int:
    """Of a streamed answer, as its last chunk says."""
    *_, last, done = stream.decode().strip().split("\n\n")
    assert done == "data: [DONE]", done
    return int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])


def measure(port: int, pids: list[int], model: str, batch: int, max_tokens: int) -> dict[str, Any]:
    """Tokens per second of so many equal requests at once."""
    busy, own, started = busy_s(), processor_s(pids) + time.process_time(), time.perf_counter()
    bodies = [question(model, max_tokens)] * batch
    seconds, answers = ask_together(port, "/v1/chat/completions", bodies)
    wall = time.perf_counter() - started
    used = processor_s(pids) + time.process_time() - own
    return {
        "kind": "http",
        "size": batch,
        "adapters": int(model != "demo"),
        "tokens_per_s": round(sum(map(num_tokens, answers)) / seconds, 1),
        "others_cpus": round(max(0.0, (busy_s() - busy - used) / wall), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    command = [sys.executable, "serve.py", "--port", str(port), "--max-num-seqs", "16"]
    busy = busy_s()
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            if server.poll() is not None or time.perf_counter() - started > START_TIMEOUT_S:
                raise SystemExit("serve.py did not start; see its message above")
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.02)
        start_s = time.perf_counter() - started
        pids = children(server.pid)
        start_cpu_s = processor_s(pids)
        used = start_cpu_s + time.process_time()
        rows: list[dict[str, Any]] = [
            {
                "kind": "start",
                "start_s": round(start_s, 2),
                "start_cpu_s": round(start_cpu_s, 2),
                "others_cpus": round(max(0.0, (busy_s() - busy - used) / start_s), 2),
            }
        ]
        models = [row["id"] for row in httpx.get(f"{url}/v1/models").json()["data"]]
        model = "guanaco" if "guanaco" in models else models[0]
        measure(port, pids, model, 1, 16)  # warms up
        for batch in options.batches:
            found = [
                measure(port, pids, model, batch, options.tokens) for _ in range(options.repeats)
            ]
            rows.append(max(found, key=lambda row: row["tokens_per_s"]))
        memory = [memory_row(pid) for pid in pids]
        worker = max(memory[1:], key=lambda row: row["resident_bytes"])  # the other tracks files
        rows[0]["resident_bytes"] = sum(row["pss_bytes"] for row in memory)
        rows[0] |= {"http_process": memory[0], "worker_process": worker}
        print(json.dumps(rows))
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
