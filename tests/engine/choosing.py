"""Has an engine choose tokens in one operation, as on a GPU, with its reference. Not a test."""

from __future__ import annotations

from kernels import dispatch
from kernels.choice import choose_tokens_reference
from kernels.dispatch import Implementation


def choose_at_once(monkeypatch) -> None:
    """From now on, in this test."""
    reference = Implementation("reference", choose_tokens_reference, lambda *_: True)
    monkeypatch.setattr(dispatch, "_implementations", {"choose_tokens": [reference]})
    monkeypatch.setattr(dispatch._registration, "has_begun", True)
    monkeypatch.setattr(dispatch._registration, "is_done", True)
