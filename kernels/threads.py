"""How many threads the CPU kernels use: PyTorch's and the native ones, the same number."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from kernels.dispatch import check

_chosen: list[int] = []
_followers: list[Callable[[int], None]] = []


def set_num_threads(num_threads: int | None = None) -> int:
    """Set it for this process.

    Args:
        num_threads: at least 1; None for as many as there are physical cores to run on.

    Returns:
        The number.

    Raises:
        ValueError: it is less than 1.
    """
    number = physical_cores() if num_threads is None else num_threads
    check(number >= 1, "num_threads", "at least 1", number)
    _chosen[:] = [number]
    torch.set_num_threads(number)
    for follower in _followers:
        follower(number)
    return number


def follow_num_threads(follower: Callable[[int], None]) -> None:
    """Call follower with the number, now and whenever it changes."""
    _followers.append(follower)
    follower(_chosen[0] if _chosen else physical_cores())


def physical_cores() -> int:
    """Cores that this process may run on; a core's second thread adds nothing to these kernels."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            with open(path, encoding="ascii") as siblings:
                cores.add(siblings.read().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
