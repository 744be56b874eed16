"""bench/gpu_e2e.py tried out on a toy model: every part runs, every row has its figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import engine.startup
from bench import gpu_e2e, gpu_e2e_http
from bench.random_model import random_weight
from kernels.nf4 import dequantize_4bit


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The script's rows, given flags."""
    monkeypatch.setattr(engine.startup, "load_base", engine.startup.load_base)  # put back after it

    def run(*flags: str) -> list[dict]:
        path = tmp_path / "rows.json"
        words = ["gpu_e2e", "--tiny", "--device", "cpu", "--output", str(path), *flags]
        monkeypatch.setattr(sys, "argv", words)
        gpu_e2e.main()
        result = json.loads(path.read_text())
        assert result["copy_gb_per_s"] > 0 and result["device"] == "cpu"
        return result["rows"]

    return run


def test_the_engines_parts_run_and_give_figures(run):
    rows = run("--only", "decode", "prefill", "adapters", "speculation")
    by_what: dict[str, list[dict]] = {}
    for row in rows:
        assert row["shape"] == "tiny"
        by_what.setdefault(row["what"], []).append(row)
    assert [row["batch"] for row in by_what["decode"]] == [1, 3]
    assert [row["tokens"] for row in by_what["prefill"]] == [20, 60]
    assert [row["adapters"] for row in by_what["adapters"]] == [1, 2]
    assert [row["mode"] for row in by_what["memory"]] == ["served", "guessing"]
    for row in (*by_what["decode"], *by_what["prefill"], *by_what["adapters"]):
        assert row["tokens_per_s"] > 0
    assert all(row["share"] > 0 for row in by_what["decode"])
    assert all(row["of_base"] > 0 for row in by_what["adapters"])
    assert all(0 <= row["acceptance"] <= 1 for row in by_what["speculation"])


@pytest.mark.slow
def test_the_server_and_the_peer_run(run):
    pytest.importorskip("bitsandbytes")
    rows = run("--only", "peer", "http")
    whats = [row["what"] for row in rows]
    assert whats == ["peer decode"] * 2 + ["peer prefill"] * 2 + ["http"]
    assert rows[-1]["ttft_ms"]["p50"] > 0


def test_what_clients_see_is_summed_up():
    answers = [[0.0, 1.0, 1.5, 2.5], [1.0, 1.25]]
    found = gpu_e2e_http._summary(answers)
    assert found["requests"] == 2 and found["tokens_per_s"] == 1.6  # 4 tokens in 2.5 s
    assert found["ttft_ms"] == {"p50": 250.0, "p99": 250.0}
    assert found["itl_ms"] == {"p50": 500.0, "p99": 500.0}


def test_made_up_weights_are_of_a_weights_size():
    weight = random_weight((64, 256), torch.bfloat16, torch.device("cpu"))
    values = dequantize_4bit(weight)
    assert values.shape == (64, 256) and 0.005 < values.std() < 0.05
