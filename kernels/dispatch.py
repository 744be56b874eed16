"""Which implementation of an operation runs: decided here and nowhere else.

Each operation's file holds its argument checks and its PyTorch reference, which is the definition
of correct and takes any arguments on any device. A faster implementation is registered under the
name of the operation, with a function that accepts or declines the arguments; the first that
accepts runs, else the reference. HERD_KERNELS=reference turns all but the references off;
HERD_KERNELS=invariant keeps a token's bits independent of the batch at any size, where that is
slower (on a GPU, above 64 tokens); by default they are up to there. HERD_NATIVE_ISA=avx2 (for
example) chooses the instruction set of the native CPU kernels, which is the best that the machine
has by default, and none turns these off.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

TOKEN_TILE = 16
"""Rows of every matrix product: one shape for every batch, so a token's sums have one order."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an operation; `run` and `accepts` take the reference's arguments."""

    name: str
    run: Callable[..., Any]
    accepts: Callable[..., bool]


_implementations: dict[str, list[Implementation]] = {}


def register(operation: str, implementation: Implementation) -> None:
    """Offer an implementation of an operation; of several, the earliest is asked first."""
    _implementations.setdefault(operation, []).append(implementation)


def unregister(operation: str, name: str) -> None:
    """Withdraw an implementation, for example one that failed its self-test."""
    _implementations[operation] = [i for i in _implementations[operation] if i.name != name]


def dispatch(operation: str, reference: Callable[..., Result], *args: Any) -> Result:
    """Run the first registered implementation that accepts the arguments, else the reference."""
    _register_all()
    for implementation in _implementations.get(operation, ()):
        if not reference_only() and implementation.accepts(*args):
            result: Result = implementation.run(*args)
            return result
    return reference(*args)


def accepts(operation: str, *args: Any) -> bool:
    """Whether anything but the reference would run for these arguments."""
    _register_all()
    implementations = _implementations.get(operation, ())
    return not reference_only() and any(i.accepts(*args) for i in implementations)


def _register_all() -> None:
    """Let those that bring faster implementations register them, at the first call of any.

    Their self-tests come back here, from the same thread; other threads wait for the end.
    """
    if _registration.is_done:
        return
    with _registration.lock:
        if _registration.has_begun:
            return
        _registration.has_begun = True
        choice = os.environ.get("HERD_NATIVE_ISA", "auto")
        if not reference_only() and choice != "none":
            from kernels.native.register import register_native  # needs this module

            register_native(choice)
        if not reference_only() and torch.cuda.is_available():
            from kernels.gpu.register import register_gpu  # needs this module

            register_gpu()
        _registration.is_done = True


class _Registration:
    lock = threading.RLock()
    has_begun = False
    is_done = False


_registration = _Registration()


def reference_only() -> bool:
    """Whether HERD_KERNELS asks for the references alone."""
    return _choice() == "reference"


def batch_invariant() -> bool:
    """Whether HERD_KERNELS asks for the same bits in any batch, whatever it costs."""
    return _choice() == "invariant"


@cache
def _choice() -> str:
    """HERD_KERNELS; it is read once.

    Raises:
        ValueError: it is set to something that means nothing.
    """
    choices = ("auto", "reference", "invariant")
    choice = os.environ.get("HERD_KERNELS", "auto")
    check(choice in choices, "HERD_KERNELS", "auto, reference or invariant", choice)
    return choice


def check(condition: bool, name: str, expected: object, found: object) -> None:
    """Refuse a wrong argument of a public kernel function.

    Raises:
        ValueError: "name: expected X, got Y".
    """
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {found}")
