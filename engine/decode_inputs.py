"""The numbers of a decode step in tensors that stay where they are.

Two sets of page-locked memory take turns. While a step runs, prepare_next fills the other set with
what the step after it will need if nobody comes or goes; load then writes the new tokens, the
blocks that were added meanwhile, and whatever else has changed. Tokens that the device alone knows
are put in their places there.

A set is written only when the copies from it have run: an event behind them is waited for. In the
course of things it lies before tokens that have been read, so that this takes no time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from engine.batch import Batch, LastTokens
from engine.sequence import Sequence
from engine.transfers import Event, record_event


class _Host:
    """One set of numbers on the host, and numpy views of them; unused rows attend to nothing."""

    def __init__(self, max_size: int, max_num_blocks: int, *, pin_memory: bool) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=pin_memory)

        self.long = zeros(3, max_size)  # input_ids, positions, slot_mapping
        self.ints = zeros(2, max_size, dtype=torch.int32)  # context_lens, lora_indices
        self.scales = zeros(max_size, dtype=torch.float32)
        self.tables = zeros(max_size, max_num_blocks, dtype=torch.int32)
        self.tokens, self.positions, self.slots = self.long.numpy()
        self.context_lens, self.lora_rows = self.ints.numpy()
        self.lora_scales, self.block_tables = self.scales.numpy(), self.tables.numpy()
        self.slots[:] = -1
        self.lora_rows[:] = -1
        self.block_tables[:] = -1
        self.copied: Event | None = None
        """Behind the last copies from here to the device."""
        self.sequences: list[Sequence] = []
        """Whose rows these are; one with drafts has a row more for each."""
        self.written: list[tuple[list[int], int]] = []
        """Each one's block table, and how many of its blocks are written here. Those that are do
        not change while the table is the same list."""

    def wait(self) -> None:
        """Until it may be written."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def set_row(self, row: int, sequence: Sequence, position: int) -> None:
        """All of one token but itself and its slot."""
        self.positions[row] = position
        self.context_lens[row] = position + 1
        self.lora_rows[row] = sequence.lora_row if sequence.request.lora_scale else -1
        self.lora_scales[row] = sequence.request.lora_scale
        self.block_tables[row, : len(sequence.block_table)] = sequence.block_table
        self.written[row] = (sequence.block_table, len(sequence.block_table))

    def clear_rows(self, start: int, stop: int) -> None:
        """Rows of nobody: position 0, no context, no slot, the base, no blocks."""
        self.tokens[start:stop] = self.positions[start:stop] = 0
        self.slots[start:stop] = -1
        self.context_lens[start:stop] = 0
        self.lora_rows[start:stop] = -1
        self.block_tables[start:stop] = -1


class DecodeInputs:
    """Static input of decode steps of up to max_size sequences."""

    def __init__(
        self, max_size: int, *, block_size: int, max_num_blocks: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._max_size = max_size
        pin_memory = device.type == "cuda"
        self._hosts = [_Host(max_size, max_num_blocks, pin_memory=pin_memory) for _ in range(2)]
        host = self._hosts[0]
        self._long, self._ints = host.long.to(device, copy=True), host.ints.to(device, copy=True)
        self._scales, self._tables = (x.to(device, copy=True) for x in (host.scales, host.tables))
        self._cu_seqlens = torch.arange(max_size + 1, dtype=torch.int32, device=device)

    def batch(self, size: int) -> Batch:
        """The tensors of a step of so many sequences, the same ones every time."""
        return Batch(
            input_ids=self._long[0, :size],
            positions=self._long[1, :size],
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            context_lens=self._ints[0, :size],
            block_tables=self._tables[:size],
            slot_mapping=self._long[2, :size],
            lora_indices=[],
            lora_scales=[],
            logit_rows=list(range(size)),
            finishing=[],
        )

    def lora(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_indices int32 [size] and lora_scales float32 [size]."""
        return self._ints[1, :size], self._scales[:size]

    def load(
        self, sequences: SequenceOf[Sequence], size: int, last: LastTokens | None = None
    ) -> int:
        """Copy one decode of each of these sequences to the device, filled up to `size` rows.

        Args:
            sequences: each lacks one token, its last, and has blocks for it and its drafts.
            size: at least their number and that of their drafts.
            last: of the step in flight, where there is one.

        Returns:
            Rows that are used.
        """
        host = self._hosts[0]
        host.wait()
        rows = [
            (sequence, offset)
            for sequence in sequences
            for offset in range(1 + len(sequence.draft_token_ids))
        ]
        self._bring_up_to_date(host, rows)
        num_rows, block_size = len(rows), self._block_size
        unknown: list[tuple[int, Sequence]] = []
        for row, (sequence, offset) in enumerate(rows):
            if sequence.num_pending_tokens:
                unknown.append((row, sequence))
                continue
            drafts = sequence.draft_token_ids
            host.tokens[row] = drafts[offset - 1] if offset else sequence.token_ids[-1]
        positions = host.positions[:num_rows]
        blocks = host.block_tables[np.arange(num_rows), positions // block_size].astype(np.int64)
        assert (blocks >= 0).all(), "a sequence without a block for its next token"
        host.slots[:num_rows] = blocks * block_size + positions % block_size
        for device, source in (
            (self._long, host.long),
            (self._ints, host.ints),
            (self._scales, host.scales),
        ):
            device.copy_(source, non_blocking=True)
        self._tables[:size].copy_(host.tables[:size], non_blocking=True)
        host.copied = record_event(self._long.device)
        if unknown:
            assert last is not None, "a token in flight without its step"
            last.fill_in(self._long[0], unknown)
        return num_rows

    def prepare_next(self) -> None:
        """Turn to the other set, and fill it as if all sequences of this one went on."""
        last, host = self._hosts
        host.wait()
        self._hosts = [host, last]
        num_seqs = len(last.sequences)
        if host.sequences != last.sequences:
            host.clear_rows(num_seqs, len(host.sequences))
            host.sequences = list(last.sequences)
            host.written = list(last.written)
            host.block_tables[:num_seqs] = last.block_tables[:num_seqs]
            host.lora_rows[:num_seqs] = last.lora_rows[:num_seqs]
            host.lora_scales[:num_seqs] = last.lora_scales[:num_seqs]
        host.positions[:num_seqs] = last.positions[:num_seqs] + 1
        host.context_lens[:num_seqs] = last.context_lens[:num_seqs] + 1

    def _bring_up_to_date(self, host: _Host, rows: list[tuple[Sequence, int]]) -> None:
        """Correct what differs from what was prepared; all of it where others run."""
        sequences = [sequence for sequence, _ in rows]
        if host.sequences != sequences:
            host.clear_rows(0, max(len(host.sequences), len(sequences)))
            host.sequences = sequences
            host.written = [([], 0)] * len(sequences)
        for row, (sequence, offset) in enumerate(rows):
            position = sequence.num_computed_tokens + offset
            table, num_blocks = host.written[row]
            if (
                table is not sequence.block_table
                or num_blocks != len(table)
                or host.positions[row] != position
            ):
                host.set_row(row, sequence, position)
