"""What travels between host and device, neither waiting for the other.

On CUDA both ways lead through page-locked memory. It is PyTorch's, which hands it out again only
when the copy has run. A step's results are copied as soon as they exist, and an event marks their
arrival: whoever reads them waits for that event and for nothing that was launched later. On the CPU
everything has been computed when a call returns, and a copy is the tensor itself.

Public  to_device, copy_to_host, HostCopy, Event, record_event
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in the device's queue."""

    def synchronize(self) -> None:
        """Wait until the device has come so far."""
        ...


def record_event(device: torch.device) -> Event | None:
    """Mark the end of what has been launched; None on the CPU, which is always there."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class HostCopy:
    """Tensors of the device on their way to the host."""

    def __init__(self, tensors: tuple[Tensor, ...], event: Event | None) -> None:
        self._tensors = tensors
        self._event = event

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the host, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


def copy_to_host(*tensors: Tensor) -> HostCopy:
    """Have tensors copied as soon as the device has computed them; nobody may change them later."""
    device = tensors[0].device
    if device.type == "cpu":
        return HostCopy(tensors, None)
    copies = tuple(
        torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        for x in tensors
    )
    return HostCopy(copies, record_event(device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, without waiting for what runs there."""
    if device.type != "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
