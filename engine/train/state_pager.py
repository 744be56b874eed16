"""Paging of optimizer state: page-locked host memory, and on a GPU only while it is used.

Copies run on a stream of their own: one group's state arrives while the one before is updated, and
goes back while the next one is. (Managed memory would do this unasked, but over-subscribing it can
hang a GPU.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Arrival:
    """State on its way to the device."""

    tensors: dict[str, torch.Tensor]
    event: torch.cuda.Event


class StatePager:
    """Moves state between page-locked host memory and one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, home: dict[str, torch.Tensor]) -> Arrival:
        """Begin to copy one group's state to the device."""
        with torch.cuda.stream(self._stream):
            tensors = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in home.items()
            }
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return Arrival(tensors, event)

    def wait(self, arrival: Arrival) -> dict[str, torch.Tensor]:
        """What was fetched; the current stream goes on once it is there."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrival.event)
        for tensor in arrival.tensors.values():
            tensor.record_stream(stream)
        return arrival.tensors

    def write_back(self, state: dict[str, torch.Tensor], home: dict[str, torch.Tensor]) -> None:
        """Begin to copy updated state to where it lives."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in state.items():
                home[name].copy_(tensor, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all copies are done."""
        self._stream.synchronize()
