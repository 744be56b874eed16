"""Where a job's metrics go besides the database: Weights & Biases, TensorBoard.

Both are optional packages, refused by name where they are missing. They run in a thread of their
own, and what goes wrong there never hurts the job: it is told once and the sink is left alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError
from server.errors import bad_request
from server.job_store import Job


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricSinks:
    """The sinks of one job that runs."""

    def __init__(
        self, job: Job, tensorboard_dir: str | None, on_failure: Callable[[str], None]
    ) -> None:
        """
        Args:
            job: its integrations are opened.
            tensorboard_dir: --tensorboard-dir.
            on_failure: called, in another thread, with what to tell the job's owner.
        """
        self._on_failure = on_failure
        self._thread: ThreadPoolExecutor | None = None
        self._sinks: list[Sink] = []
        openers: list[tuple[str, Callable[[], Sink]]] = [
            ("wandb", functools.partial(_Wandb, job, settings["wandb"]))
            for settings in job.integrations or []
        ]
        if tensorboard_dir is not None:
            openers.append(
                ("tensorboard", functools.partial(_Tensorboard, Path(tensorboard_dir) / job.id))
            )
        if openers:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        for name, opener in openers:
            self._do(self._open, name, opener)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a step's metrics on; returns at once."""
        self._do(self._log, step, dict(metrics))

    def close(self) -> None:
        """Close all when what was logged has been written; returns at once."""
        self._do(self._close)
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _do(self, work: Callable[..., None], *arguments: object) -> None:
        if self._thread is not None:
            self._thread.submit(work, *arguments)

    def _open(self, name: str, opener: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(opener())
        except Exception as error:  # another package's boundary
            self._on_failure(f"{name} could not be opened and is left out: {error}")

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in list(self._sinks):
            try:
                sink.log(step, metrics)
            except Exception as error:  # another package's boundary
                self._sinks.remove(sink)
                name = type(sink).__name__.strip("_").lower()
                self._on_failure(f"{name} failed and is left out from here on: {error}")

    def _close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # another package's boundary
                self._on_failure(f"a metrics sink could not be closed: {error}")


def check_integrations(integrations: list[dict[str, Any]]) -> None:
    """Raises:
    ApiError: 400, an integration's package is not installed.
    """
    if integrations and not _is_installed("wandb"):
        raise bad_request(
            "integrations: the Python package 'wandb' is not installed where the server runs. "
            "Install it there (pip install wandb) and log in, or leave integrations out",
            "integrations",
        )


def check_tensorboard(folder: str | None) -> None:
    """Raises:
    EngineError: --tensorboard-dir is given and its package is not installed.
    """
    if folder is not None and not _is_installed("tensorboard"):
        raise EngineError(
            f"--tensorboard-dir {folder}: the Python package 'tensorboard' is not installed. "
            f"Install it (pip install tensorboard), or leave the flag out."
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class _Wandb:
    def __init__(self, job: Job, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings["project"],
            name=settings.get("name") or job.model_name,
            entity=settings.get("entity"),
            tags=settings.get("tags"),
            id=job.id,
            resume="allow",
            config=job.config,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
