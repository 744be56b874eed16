"""Choosing tokens on a GPU, timed; bench/gpu_attention.py --only sampling runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_linear import time_us
from kernels.choice import TokenTables
from kernels.gpu import choice, sampling
from kernels.gpu.selftest_choice import plain_tables, tables_on
from kernels.sampling import GREEDY_BELOW, draw, greedy, top_logprobs, uniform
from kernels.truncation import truncate_reference

PENALTIES = {"repetition": 1.1, "presence": 0.1, "frequency": 0.1}
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "drawn, all penalties": {"temperature": 0.8, **PENALTIES},
    "greedy, 5 logprobs": {"num_top": 5},
}


def time_sampling(
    device: torch.device, vocab_sizes: tuple[int, ...], batches: tuple[int, ...]
) -> list[dict[str, Any]]:
    """choose_tokens as it is launched, beside the operators one by one; truncation alone, beside
    PyTorch's sort. What stands beside includes the launches, and waiting where it waits."""
    results = []
    for vocab_size, batch in itertools.product(vocab_sizes, batches):
        logits = torch.randn(batch, vocab_size, device=device).mul_(3)
        for name, numbers in CHOICES.items():
            tables = make_tables(batch, vocab_size, device, **numbers)
            row: dict[str, Any] = {"choice": name, "vocab_size": vocab_size, "batch": batch}
            row["us"] = time_us([partial(choice.run, logits, tables)] * 4, device)
            if "penalties" not in name:
                row["operators, us"] = time_eager(
                    [partial(choose_by_operators, logits.clone(), tables) for _ in range(2)], device
                )
            results.append(row)
            print(row, flush=True)
        results += time_truncation(logits.softmax(dim=-1), device)
    return results


def make_tables(
    batch: int, vocab_size: int, device: torch.device, *, num_top: int = 0, **numbers: Any
) -> TokenTables:
    """Tables of rows that all ask for the same; with penalties, 500 tokens have occurred."""
    places = torch.arange(batch)
    if "repetition" in numbers:
        numbers = {**numbers, "counts": places, "is_counted": 1}
    if num_top:
        numbers = {**numbers, "logprobs": places}
    tables = plain_tables(batch, vocab_size, **numbers)
    counts = torch.zeros(batch if "counts" in numbers else 0, vocab_size, dtype=torch.int16)
    counts[:, torch.randperm(vocab_size)[:500]] = 1
    return tables_on(replace(tables, counts=counts, num_top=num_top), device)


def choose_by_operators(logits: Tensor, tables: TokenTables) -> Any:
    """The same without penalties, as where the kernels are off; logits are changed."""
    temperature = tables.number("temperature")
    if not tables.has_draws:
        token_ids = greedy(logits)
        return top_logprobs(logits, token_ids, tables.num_top) if tables.num_top else token_ids
    min_p, top_k, top_p = (tables.number(name) for name in ("min_p", "top_k", "top_p"))
    return draw(
        logits, temperature.clamp(min=GREEDY_BELOW), uniform(tables.seeds, tables.positions),
        min_p=min_p if min_p.any() else None, top_k=top_k.long() if top_k.any() else None,
        top_p=top_p if (top_p < 1).any() else None,
    )  # fmt: skip


def time_truncation(probs: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """The kernel of kernels/gpu/sampling.py, which runs where choosing at once is off."""
    results = []
    batch, vocab_size = probs.shape
    k = torch.full((batch,), 50, device=device)
    p = torch.full((batch,), 0.9, device=device)
    for name, rules in (("top-k", (None, k, None)), ("top-p", (None, None, p))):
        copies = [probs.clone() for _ in range(4)]
        us = time_us([partial(sampling.truncate, copy, *rules) for copy in copies], device)
        eager = [partial(truncate_reference, probs.clone(), *rules) for _ in range(2)]
        results.append({
            "rule": name, "vocab_size": vocab_size, "batch": batch, "us": us,
            "PyTorch, us": time_eager(eager, device),
        })  # fmt: skip
        print(results[-1], flush=True)
    return results


def time_eager(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """Microseconds of the second of two calls."""
    if device.type != "cuda":
        return time_us(calls[1:], device)
    calls[0]()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls[1]()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3
