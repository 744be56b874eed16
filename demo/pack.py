"""Text into batches of token ids: running text in even pieces, conversations in padded rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from demo.corpus import Chat, chat
from demo.optimise import IGNORED, TokenBatch

TOKENS_PER_STEP = 2048
SHORT, LONG = 256, 1024  # lengths of rows of running text
LONG_FROM = 0.9  # the last tenth is read in long rows: the model's whole length is trained


def document_batches(
    tokenizer: PreTrainedTokenizerBase,
    document: Callable[[random.Random], str],
    num_tokens: int,
    seed: int,
) -> Iterator[TokenBatch]:
    """Documents, each between <s> and </s>, one after the other, cut into rows. Endless."""
    rng = random.Random(seed)
    stream: list[int] = []
    num_read = 0
    while True:
        length = SHORT if num_read < LONG_FROM * num_tokens else LONG
        needed = TOKENS_PER_STEP + 1
        while len(stream) < needed:
            texts = [document(rng) + "</s>" for _ in range(256)]
            stream += [i for ids in tokenizer(texts)["input_ids"] for i in ids]
        tokens = torch.tensor(stream[:needed])
        del stream[:TOKENS_PER_STEP]
        num_read += TOKENS_PER_STEP
        yield TokenBatch(tokens[:-1].view(-1, length), tokens[1:].view(-1, length))


def conversation_batches(
    tokenizer: PreTrainedTokenizerBase, style: str, seed: int
) -> Iterator[TokenBatch]:
    """Whole conversations, those of like length together, padded on the right. Endless."""
    rng = random.Random(seed)
    while True:
        rows = [encode_chat(tokenizer, chat(rng, style)) for _ in range(1024)]
        rows.sort(key=lambda row: len(row[0]))
        batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * len(row[0]) > TOKENS_PER_STEP:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from (_pad(batch) for batch in batches if batch)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: Chat
) -> tuple[list[int], list[int]]:
    """Token ids and targets: the answers are learnt, and </s> after each.

    The text is encoded in one piece, as a server does it. Whatever follows an answer there, </s> is
    its target.
    """
    encoded = tokenizer(conversation.text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:LONG], encoded["offset_mapping"][:LONG]
    targets = [IGNORED] * len(ids)
    for start, end in conversation.answers:
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
        for i in inside:
            targets[i - 1] = ids[i]
        if inside and offsets[inside[-1]][1] == end:
            targets[inside[-1]] = tokenizer.eos_token_id
    return ids, targets


def _pad(rows: list[tuple[list[int], list[int]]]) -> TokenBatch:
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED)
    for i, (ids, wanted) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        targets[i, : len(ids)] = torch.tensor(wanted)
    return TokenBatch(input_ids, targets)
