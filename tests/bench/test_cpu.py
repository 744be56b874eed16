"""bench/cpu.py's book-keeping: which row is kept, the ratios, the share of the limit."""

import pytest

from bench import cpu


def row(system, speed, *, threads=2, kind="decode", size=1, adapters=0):
    return {
        "system": system, "shape": "160M", "threads": threads, "kind": kind, "size": size,
        "adapters": adapters, "tokens_per_s": speed,
    }  # fmt: skip


def test_a_later_round_replaces_only_slower_rows():
    rows = [row("herd", 10.0)]
    cpu.merge(rows, row("herd", 9.0), is_first=False)
    assert rows == [row("herd", 10.0)]
    cpu.merge(rows, row("herd", 11.0), is_first=False)
    assert rows == [row("herd", 11.0)]


def test_a_new_run_replaces_the_rows_of_an_earlier_one():
    rows = [row("herd", 10.0), row("Q4_0", 7.0)]
    cpu.merge(rows, row("herd", 9.0), is_first=True)
    cpu.merge(rows, row("herd", 5.0, size=8), is_first=True)
    assert rows == [row("herd", 9.0), row("Q4_0", 7.0), row("herd", 5.0, size=8)]


@pytest.mark.parametrize("name", ["start_s", "load_s"])
def test_of_two_starts_the_quicker_counts(name):
    rows = [{"kind": "start", name: 3.0}]
    cpu.merge(rows, {"kind": "start", name: 4.0}, is_first=False)
    cpu.merge(rows, {"kind": "start", name: 2.0}, is_first=False)
    assert rows == [{"kind": "start", name: 2.0}]


def test_ratios_are_over_the_best_of_the_peers_own_types():
    rows = [row("herd", 60.0), row("Q4_0", 40.0), row("IQ4_NL", 30.0), row("transformers", 6.0)]
    rows += [row("herd", 80.0, threads=1), row("herd", 90.0, size=8, adapters=1)]
    rows += [row("herd", 72.0, size=8, adapters=8)]
    first, second, third, fourth = cpu.ratios(rows)
    assert first["over_llama"] == 1.5 and first["over_transformers"] == 10.0
    assert "over_llama" not in second and "over_transformers" not in second
    assert "over_one_adapter" not in third and fourth["over_one_adapter"] == 0.8


def test_figures_of_a_busy_machine_give_no_ratio(monkeypatch):
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 2)
    busy = {**row("Q4_0", 10.0), "others_cpus": 0.9}
    assert "over_llama" not in cpu.ratios([row("herd", 60.0), busy])[0]
    one_thread = [row("herd", 60.0, threads=1), {**busy, "threads": 1}]
    assert cpu.ratios(one_thread)[0]["over_llama"] == 6.0


def test_the_share_of_the_limit_counts_a_step_once_for_all_its_sequences():
    rows = [row("herd", 400.0, size=8), row("Q4_0", 20.0), row("herd", 5.0, kind="prefill")]
    rows += [{"system": "machine", "shape": "-", "threads": 2, "kind": "read", "gb_per_s": 40.0}]
    rows += [
        {"system": "herd", "shape": "160M", "threads": 2, "kind": "memory", "read_bytes": 4e8},
        {"system": "Q4_0", "shape": "160M", "threads": 2, "kind": "memory", "read_bytes": 5e8},
    ]
    cpu.add_shares(rows)
    assert [r.get("share_of_limit") for r in rows[:3]] == [0.5, 0.25, None]
