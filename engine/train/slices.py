"""A trainer's generator as the worker sees it: where it stands, how far the device is behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import GeneratorType
from typing import Any

import torch

from engine.train.run import Slices


class Pace:
    """How far the host may run ahead of the device: a slice is only queued when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._last: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until all that was queued has run."""
        if self._is_cuda:
            torch.cuda.synchronize()
            self._last = None

    def let_run_ahead(self) -> None:
        """Until all but the last slice has run: the device has work, a newcomer waits for one."""
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            if self._last is not None:
                self._last.synchronize()
            self._last = event


def suspended_at(slices: Slices[None]) -> Hashable:
    """Where a generator, or the one that it delegates to, goes on: the kind of its next slice."""
    inner = _chain(slices)[-1]
    return inner.gi_code, inner.gi_frame and inner.gi_frame.f_lineno


def is_inside(function: Callable[..., Any], slices: Slices[None]) -> bool:
    """Whether a generator is in the middle of what this function delegates to."""
    code = function.__code__
    return any(inner.gi_code is code for inner in _chain(slices)[:-1])


def is_at(function: Callable[..., Any], slices: Slices[None]) -> bool:
    """Whether a generator is in this function itself."""
    return _chain(slices)[-1].gi_code is function.__code__


def _chain(slices: Slices[None]) -> list[Any]:
    """A generator, the one that it delegates to, and so on."""
    chain: list[Any] = [slices]
    while isinstance(chain[-1].gi_yieldfrom, GeneratorType):
        chain.append(chain[-1].gi_yieldfrom)
    return chain
