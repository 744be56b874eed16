"""Memory that kernels keep from one call to the next."""

from __future__ import annotations

from kernels.dispatch import dispatch


def free_scratch() -> None:
    """Free what kernels that this thread has called keep for their next call.

    They keep as much as the longest prompt took: 86 MB for 2048 tokens of a 1.1B model. The next
    long prompt takes it again, in which the system clears every page.
    """
    dispatch("free_scratch", _keep_nothing)


def _keep_nothing() -> None:
    """free_scratch of the references."""
