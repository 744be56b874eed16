"""From a schedule to tensors."""

from __future__ import annotations

import pytest
import torch

from engine.api import GenerateRequest, SamplingParams
from engine.batch import LastTokens, make_batch
from engine.sequence import Sequence

CPU = torch.device("cpu")


def make_sequence(token_ids, num_computed, blocks, *, row: int = -1, scale: float = 1.0):
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=tuple(token_ids),
        params=SamplingParams(max_tokens=1),
        lora_scale=scale,
    )
    return Sequence(
        request=request,
        arrival=0,
        token_ids=list(token_ids),
        num_computed_tokens=num_computed,
        block_table=blocks,
        lora_row=row,
    )


def test_decodes_and_prompt_chunks_lie_flat_one_after_another():
    decode = make_sequence([10, 11, 12, 13, 14], 4, [7, 2], row=1, scale=0.5)
    whole = make_sequence([20, 21, 22], 0, [5])
    chunk = make_sequence([30, 31, 32, 33, 34, 35, 36, 37, 38], 3, [0, 9, 4])
    batch = make_batch([(decode, 1), (whole, 3), (chunk, 4)], block_size=4, device=CPU)

    assert batch.input_ids.tolist() == [14, 20, 21, 22, 33, 34, 35, 36]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5, 6]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 8]
    assert batch.context_lens.tolist() == [5, 3, 7]
    assert batch.block_tables.tolist() == [[7, 2, -1], [5, -1, -1], [0, 9, 4]]
    assert batch.slot_mapping.tolist() == [8, 20, 21, 22, 3, 36, 37, 38]
    assert batch.lora_indices == [1, -1, -1, -1, -1, -1, -1, -1]
    assert batch.lora_scales == [0.5, 1, 1, 1, 1, 1, 1, 1]
    # The chunk does not reach its prompt's end: it gets no token.
    assert batch.logit_rows == [0, 3]
    assert batch.finishing == [decode, whole]


def test_dtypes_are_those_the_kernels_take():
    batch = make_batch([(make_sequence([1, 2], 0, [0]), 2)], block_size=4, device=CPU)
    for name in ("input_ids", "positions", "slot_mapping"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("cu_seqlens_q", "context_lens", "block_tables"):
        assert getattr(batch, name).dtype == torch.int32


def test_making_a_batch_changes_no_sequence():
    sequence = make_sequence([1, 2, 3], 1, [3])
    before = (list(sequence.token_ids), sequence.num_computed_tokens, list(sequence.block_table))
    make_batch([(sequence, 2)], block_size=4, device=CPU)
    assert before == (sequence.token_ids, sequence.num_computed_tokens, sequence.block_table)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1], [0, 1]])
def test_tokens_that_the_device_alone_knows_are_put_in_their_places_there(order):
    sequences = [make_sequence([5, 6, 7], 3, [number]) for number in range(3)]
    last = LastTokens(torch.tensor([40, -2, 42]), {s: row for row, s in enumerate(sequences)})
    for sequence in sequences:
        sequence.num_pending_tokens = 1
    prompt = make_sequence([1, 2, 3], 0, [9])
    for items in (
        [(sequences[i], 1) for i in order],
        [(prompt, 2), *((sequences[i], 1) for i in order)],
    ):
        batch = make_batch(items, block_size=4, device=CPU, last=last)
        known = [1, 2] if items[0][0] is prompt else []
        # A row without a token runs on with one that the model knows.
        assert batch.input_ids.tolist() == known + [(40, 0, 42)[i] for i in order]
        assert batch.positions.tolist() == [*range(len(known)), *[3] * len(order)]
        assert batch.finishing == [sequences[i] for i in order]
