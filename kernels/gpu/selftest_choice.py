"""A batch that asks for everything, and whether choosing tokens at once gives what it should."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels.choice import (
    FLOATS,
    IN_PROMPT,
    INTS,
    TokenTables,
    choose_tokens_reference,
)
from kernels.gpu.selftest import Accepts, Run, random

NUM_ROWS, VOCAB_SIZE = 12, 1100
LOGPROB_TOLERANCE = 1e-4


def random_batch(num_rows: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, TokenTables]:
    """Logits and tables of rows that ask for one thing, for several or for nothing."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(num_rows)

    def uniform(scale: float, where: Tensor) -> Tensor:
        return torch.rand(num_rows, generator=generator) * scale * where

    def token_ids(count: int) -> Tensor:
        return torch.randint(vocab_size, (count,), generator=generator).int()

    floats = {
        "temperature": uniform(2.0, row % 3 > 0),
        "min_p": uniform(0.1, row % 4 == 1),
        "top_p": 1 - uniform(0.5, row % 2 == 1),
        "repetition": 1 + uniform(1.0, row % 2 == 0),
        "presence": uniform(1.0, row % 5 > 0),
        "frequency": uniform(1.0, row % 5 > 1),
    }
    is_counted = (row < 8) & (row % 2 == 0)
    place = torch.where(is_counted, row // 2, 4)  # the rest shares a row
    ints = {
        "top_k": row * 7 % 60 * (row % 5 > 1),
        "counts": torch.where(row % 7 == 1, -1, place),
        "is_counted": is_counted,
        "mask": torch.where(row % 3 == 1, row % 2, -1),
        "logprobs": torch.where(row % 2 == 0, row // 2, -1),
        "additions": 2 * row,
        "additions_end": 2 * row + 2 * (row % 4 != 3),
        "drafts": row % 2,
        "drafts_end": row % 2 + row % 4,
    }
    counts = torch.zeros(5, vocab_size, dtype=torch.int16)
    counts[:, token_ids(1 + vocab_size // 5).long()] = 3
    counts[:, token_ids(1 + vocab_size // 5).long()] += IN_PROMPT
    num_words = (vocab_size + 31) // 32
    words = torch.randint(-(2**31), 2**31, (2, num_words), generator=generator)
    tables = TokenTables(
        floats=torch.stack([floats[name] for name in FLOATS]),
        ints=torch.stack([ints[name].int() for name in INTS]),
        seeds=row * 977 - 5,
        positions=row * 3,
        counts=counts,
        addition_ids=token_ids(2 * num_rows),
        amounts=torch.randn(2 * num_rows, generator=generator) * 5,
        until=torch.tensor([100, 10] * num_rows).int(),
        draft_ids=token_ids(4),
        bitmask=words.int(),
        num_reported=int((row % 2 == 0).sum()),
        num_top=min(5, vocab_size),
        has_draws=bool((floats["temperature"] > 0).any()),
    )
    return random(num_rows, vocab_size, seed=seed) * 3, tables


def plain_tables(num_rows: int, vocab_size: int, **numbers: Any) -> TokenTables:
    """Tables of rows that ask for nothing but for these numbers, one of each row's or for all."""
    _, tables = random_batch(num_rows, vocab_size)
    tables.ints.zero_()
    tables.floats.zero_()
    tables.counts.zero_()
    neutral = {"top_p": 1.0, "repetition": 1.0, "counts": -1, "mask": -1, "logprobs": -1}
    for name, value in (neutral | numbers).items():
        tables.number(name)[:] = torch.as_tensor(value)
    has_draws = bool(tables.number("temperature").any())
    num_reported = int((tables.number("logprobs") >= 0).sum())
    return replace(tables, num_reported=num_reported, num_top=0, has_draws=has_draws)


def tables_on(tables: TokenTables, device: torch.device) -> TokenTables:
    """A copy on the device."""
    copies: dict[str, Any] = {}
    for field in fields(tables):
        value = getattr(tables, field.name)
        if isinstance(value, Tensor):
            copies[field.name] = value.to(device, copy=True)
    return replace(tables, **copies)


def choose_tokens(run: Run, accepts: Accepts, device: torch.device) -> str | None:
    """Greedy and drawn rows, with everything and with nothing; then greedy ones alone."""
    logits, tables = random_batch(NUM_ROWS, VOCAB_SIZE)
    greedy = tables_on(tables, logits.device)
    greedy.number("temperature").zero_()
    for case in (tables, replace(greedy, has_draws=False)):
        problem = _choose(run, accepts, device, logits, case)
        if problem:
            return problem
    return None


def _choose(
    run: Run, accepts: Accepts, device: torch.device, logits: Tensor, tables: TokenTables
) -> str | None:
    there = logits.to(device), tables_on(tables, device)
    if not accepts(*there):
        return "not made for this device"
    actual = run(*there)
    own = tables_on(tables, logits.device)
    expected = choose_tokens_reference(logits, own)
    if not torch.equal(actual.token_ids.cpu(), expected.token_ids):
        return "other tokens are chosen"
    if not torch.equal(there[1].counts.cpu(), own.counts):
        return "other tokens are counted"
    if not torch.equal(actual.top_ids.cpu(), expected.top_ids):
        return "other tokens are the most likely"
    pairs = (
        (actual.logprobs, expected.logprobs),
        (actual.top_logprobs, expected.top_logprobs),
    )
    worst = max(((x.cpu() - y).abs().max().item() for x, y in pairs), default=0.0)
    return None if worst <= LOGPROB_TOLERANCE else f"log-probabilities are {worst:.3g} off"
