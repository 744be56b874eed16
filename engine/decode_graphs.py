"""Decode steps as recorded graphs: one launch instead of a thousand.

A graph reads its input where it was recorded, so the step's numbers are copied into static tensors
first. It is recorded for a few numbers of sequences; a batch in between is filled up with rows that
attend to nothing and whose keys and values are not stored. One set of graphs serves base and
adapters: a row names its adapter, -1 is the base.

When      every sequence decodes, and the adapters among them have low-rank parts only. All else is
          run as it always is. A guessed token is a row like any other: its keys and values are
          stored before a layer's attention reads them, and it sees what stands before it.
Recorded  when a size is first needed, after the pool of adapters has stayed the same for
          SETTLED_STEPS steps: addresses of adapters are part of a recording, so a change of the
          pool throws all of them away.
Input     is written into page-locked memory, of which there are two, so that the next step's may
          be prepared while this step's is being copied and run: prepare_next assumes that all
          sequences of this step go on, which load then only completes.
Public    GraphBackend, DecodeGraphs; the device's own backend is engine/cuda_graphs.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.api import RecordingProgress
from engine.batch import LastTokens
from engine.decode_inputs import DecodeInputs
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.kv_cache import KVCaches
    from engine.model_runner import Model

logger = logging.getLogger(__name__)

SETTLED_STEPS = 8
"""Steps of decoding with the same adapters in the pool before anything is recorded."""


class GraphBackend(Protocol):
    """What a device offers."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what a function launches, after it has run once; returns what runs it again.

        Raises:
            RuntimeError: something in it cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """Nothing that was captured will run again."""
        ...

    def memory_bytes(self) -> int:
        """Memory of the device in use now."""
        ...


class LoraGraphRows(Protocol):
    """What graphs need of the LoRA pool."""

    @property
    def version(self) -> int:
        """Changes whenever a row does."""
        ...

    def may_be_recorded(self, rows: SequenceOf[int]) -> bool:
        """Whether these rows' adapters have low-rank parts only; -1 is the base."""
        ...

    def static_batch(self, lora_indices: torch.Tensor, lora_scales: torch.Tensor) -> Any:
        """A LoraBatch that reads its rows from these tensors; None while no adapter is there."""
        ...


class DecodeGraphs:
    """The recorded steps of one model, and their input."""

    def __init__(
        self,
        model: Model,
        kv_caches: KVCaches,
        pool: LoraGraphRows,
        backend: GraphBackend,
        *,
        sizes: tuple[int, ...],
        block_size: int,
        max_num_blocks: int,
        device: torch.device,
        budget_bytes: int | None = None,
        report: Callable[[RecordingProgress], None] = lambda _: None,
    ) -> None:
        """
        Args:
            sizes: numbers of sequences to record, ascending.
            block_size: tokens per KV block.
            max_num_blocks: of one sequence's block table.
            budget_bytes: of the device's memory that recordings may take; None: any.
            report: told before and after each recording, which takes a moment that people notice.
        """
        self._model = model
        self._kv_caches = kv_caches
        self._pool = pool
        self._backend = backend
        self._sizes = sizes
        self._budget_bytes = budget_bytes
        self._report = report
        self._inputs = DecodeInputs(
            max(sizes), block_size=block_size, max_num_blocks=max_num_blocks, device=device
        )
        self._replays: dict[int, Callable[[], None]] = {}
        self._logits: dict[int, torch.Tensor] = {}  # float32 [size, vocab_size] each
        self._version = pool.version
        self._num_settled = 0
        self._is_given_up = False
        """Something in a step cannot be recorded."""
        self.num_bytes = 0
        """What the recordings that there are have taken of the device's memory."""

    def run(
        self, items: SequenceOf[tuple[Sequence, int]], last: LastTokens | None = None
    ) -> torch.Tensor | None:
        """A decode step's logits, float32 [num_tokens, vocab_size], which the next one overwrites;
        None where this step has to run as others do."""
        size = self._size_for(items)
        if size is None:
            return None
        if self._pool.version != self._version:
            self._forget()
        self._num_settled += 1
        is_known = size in self._replays
        if not is_known and not self._may_record:
            return None
        num_rows = self._inputs.load([sequence for sequence, _ in items], size, last)
        if not is_known and not self._record(size):
            return None
        self._replays[size]()
        return self._logits[size][:num_rows]

    def prepare_next(self) -> None:
        """Work out the next step's input as if this step's sequences all went on; on a GPU this
        step is still running."""
        self._inputs.prepare_next()

    @property
    def _may_record(self) -> bool:
        has_room = self._budget_bytes is None or self.num_bytes <= self._budget_bytes
        return has_room and not self._is_given_up and self._num_settled > SETTLED_STEPS

    def _size_for(self, items: SequenceOf[tuple[Sequence, int]]) -> int | None:
        num_rows = sum(count for _, count in items)
        if num_rows > self._sizes[-1]:
            return None
        # A prompt's last token is no decode: it may be scored, or tell about the prompt.
        if not all(s.num_missing_tokens == 1 and s.has_output for s, _ in items):
            return None
        if not self._pool.may_be_recorded([sequence.lora_row for sequence, _ in items]):
            return None
        return next(size for size in self._sizes if size >= num_rows)

    def _record(self, size: int) -> bool:
        """Record the step of so many sequences; False where that cannot be done, now or ever."""
        batch = self._inputs.batch(size)
        lora = self._pool.static_batch(*self._inputs.lora(size))

        def run() -> None:
            hidden = self._model(batch, self._kv_caches, lora)
            self._logits[size] = self._model.logits(hidden, lora)

        before_bytes = self._backend.memory_bytes()
        self._report_progress(is_recording=True)
        try:
            self._replays[size] = self._backend.capture(run)
        except torch.AcceleratorError:
            raise  # the device is lost
        except RuntimeError as error:
            logger.warning("Decode steps are not recorded as graphs: %s", error)
            self._is_given_up = True
            return False
        finally:
            self._report_progress(is_recording=False)
        self.num_bytes += max(0, self._backend.memory_bytes() - before_bytes)
        logger.info(
            "Recorded the decode step of %d sequences (%d of %d sizes, %.0f MB in all).",
            size, len(self._replays), len(self._sizes), self.num_bytes / 1e6,
        )  # fmt: skip
        if self._budget_bytes is not None and self.num_bytes > self._budget_bytes:
            logger.warning(
                "Recordings take %.0f MB, more than the %.0f MB kept for them: no further ones "
                "until the adapters in the pool change.",
                self.num_bytes / 1e6, self._budget_bytes / 1e6,
            )  # fmt: skip
        return True

    def _report_progress(self, *, is_recording: bool) -> None:
        self._report(
            RecordingProgress(
                num_recorded=len(self._replays),
                num_sizes=len(self._sizes),
                is_recording=is_recording,
            )
        )

    def _forget(self) -> None:
        """The pool has changed: what was recorded reads adapters where they no longer are.
        CUDA lets a recording in flight run to its end before it frees it."""
        self._replays.clear()
        self._logits.clear()
        self._backend.forget()
        self.num_bytes = 0
        self._version = self._pool.version
        self._num_settled = 0
