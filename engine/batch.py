"""From a schedule to tensors: a pure function. Names, shapes and dtypes are the field's.

Built in numpy, because most arrays are a few dozen numbers and a step pays for each tensor
operation. On CUDA they travel through pinned memory, without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from engine.sequence import Sequence
from engine.transfers import to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's input: the tokens of all its sequences, flat, one sequence after another."""

    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1], prefix sums of new tokens
    context_lens: (
        torch.Tensor
    )  # int32 [num_seqs], tokens visible to attention, this step's included
    block_tables: torch.Tensor  # int32 [num_seqs, max_num_blocks], padded with -1
    slot_mapping: torch.Tensor  # int64 [num_tokens], block_id * block_size + offset
    lora_indices: list[int]  # [num_tokens], pool row; -1 = base
    lora_scales: list[float]  # [num_tokens]
    logit_rows: list[
        int
    ]  # [num_rows], of each sequence that has no more tokens to run its last one, and its drafts
    finishing: list[Sequence]  # [num_rows], the sequences of those rows


@dataclass(frozen=True, slots=True)
class LastTokens:
    """What the step in flight chooses: known to the device alone."""

    token_ids: torch.Tensor  # int64 [num_rows]; negative where a text ends with an error
    rows: dict[Sequence, int]

    def fill_in(self, input_ids: torch.Tensor, places: list[tuple[int, Sequence]]) -> None:
        """Put each of these sequences' last token in its place, on the device.

        Args:
            input_ids: int64 [num_tokens].
            places: (place in input_ids, sequence).
        """
        # A text that has ended runs along until the host knows; it needs some token of the model's.
        if list(self.rows) == [sequence for _, sequence in places] and places[-1][0] < len(places):
            # As a rule all go on, in their order.
            torch.clamp(self.token_ids, min=0, out=input_ids[: len(places)])
            return
        index = torch.tensor(
            [[place for place, _ in places], [self.rows[sequence] for _, sequence in places]]
        )
        targets, sources = to_device(index, input_ids.device)
        input_ids.index_copy_(0, targets, self.token_ids[sources].clamp(min=0))


def make_batch(
    items: SequenceOf[tuple[Sequence, int]],
    *,
    block_size: int,
    device: torch.device,
    last: LastTokens | None = None,
) -> Batch:
    """Lay out the scheduled tokens.

    Args:
        items: (sequence, num_new_tokens), drafts included; block tables cover num_computed_tokens
            + num_new_tokens.
        block_size: tokens per KV block.
        device: where the tensors go.
        last: of the step in flight, where there is one.
    """
    num_seqs = len(items)
    input_ids: list[int] = []
    unknown: list[tuple[int, Sequence]] = []
    lora_indices: list[int] = []
    lora_scales: list[float] = []
    logit_rows: list[int] = []
    finishing: list[Sequence] = []
    starts = np.empty(num_seqs, dtype=np.int64)
    counts = np.empty(num_seqs, dtype=np.int64)
    max_num_blocks = max(len(sequence.block_table) for sequence, _ in items)
    tables = np.full((num_seqs, max_num_blocks), -1, dtype=np.int32)
    for index, (sequence, num_new_tokens) in enumerate(items):
        start = sequence.num_computed_tokens
        end = start + num_new_tokens
        starts[index], counts[index] = start, num_new_tokens
        tables[index, : len(sequence.block_table)] = sequence.block_table
        if sequence.num_pending_tokens:
            unknown.append((len(input_ids), sequence))
            input_ids.append(0)
            lora_indices.append(sequence.lora_row)
            lora_scales.append(sequence.request.lora_scale)
        elif num_new_tokens == 1:
            input_ids.append(sequence.token_ids[start])
            lora_indices.append(sequence.lora_row)
            lora_scales.append(sequence.request.lora_scale)
        else:
            input_ids += sequence.token_ids[start:end]
            input_ids += sequence.draft_token_ids
            lora_indices += [sequence.lora_row] * num_new_tokens
            lora_scales += [sequence.request.lora_scale] * num_new_tokens
        num_rows = end - sequence.num_tokens + 1
        if num_rows > 0:
            logit_rows += range(len(input_ids) - num_rows, len(input_ids))
            finishing += [sequence] * num_rows
    ends = np.cumsum(counts)
    cu_seqlens_q = np.zeros(num_seqs + 1, dtype=np.int32)
    cu_seqlens_q[1:] = ends
    seq_of_token = np.repeat(np.arange(num_seqs), counts)  # [num_tokens]
    positions = np.arange(ends[-1]) + (starts - (ends - counts))[seq_of_token]
    slot_mapping = tables[seq_of_token, positions // block_size].astype(np.int64) * block_size
    slot_mapping += positions % block_size
    ids = _to(np.array(input_ids, dtype=np.int64), device)
    if unknown:
        assert last is not None, "a token in flight without its step"
        last.fill_in(ids, unknown)
    return Batch(
        input_ids=ids,
        positions=_to(positions, device),
        cu_seqlens_q=_to(cu_seqlens_q, device),
        context_lens=_to((starts + counts).astype(np.int32), device),
        block_tables=_to(tables, device),
        slot_mapping=_to(slot_mapping, device),
        lora_indices=lora_indices,
        lora_scales=lora_scales,
        logit_rows=logit_rows,
        finishing=finishing,
    )


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(values), device)
