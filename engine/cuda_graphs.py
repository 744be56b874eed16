"""CUDA's graphs, as engine/decode_graphs.py wants them. Those that live share one pool of memory.

What they run is run once before, on the stream on which it is then recorded: what libraries keep
for a stream, cuBLAS its workspace, then lies outside of the pool and outlives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaGraphBackend:
    """Recordings on one GPU; they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._memory_pool: Any = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record a function, after it has run once: that compiles kernels and sizes buffers.

        Raises:
            RuntimeError: something in it waits for the device.
            torch.AcceleratorError: the device is lost.
        """
        try:
            return self._capture(run)
        except torch.AcceleratorError as error:
            torch.cuda.synchronize(self._device)  # raises where it was more than a recording
            raise RuntimeError(str(error)) from error

    def forget(self) -> None:
        """All recordings are gone, and their pool with them: it cannot be entered again."""
        self._memory_pool = None

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Meanwhile the thread that loads adapters may pin memory, which another mode would forbid.
        mode = "thread_local"
        with torch.cuda.graph(
            graph, pool=self._memory_pool, stream=stream, capture_error_mode=mode
        ):
            run()
        self._memory_pool = graph.pool()
        return graph.replay

    def memory_bytes(self) -> int:
        """Memory in use on the device, by whomever."""
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes
