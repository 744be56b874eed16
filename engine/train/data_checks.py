"""What must be true of tokenised data before anything is trained on them."""

from __future__ import annotations

import hashlib

import torch

from engine.errors import RequestError
from engine.train.config import TrainConfig
from engine.train.token_dataset import METHOD_KIND, TokenDataset

MAX_NAMED = 10
"""Samples named in an error."""


def check_data(config: TrainConfig, dataset: TokenDataset, name: str) -> None:
    """Refuse data that the method does not read, or from which there is nothing to learn.

    Args:
        config:  as the user gave it.
        dataset: the data.
        name:    what an error calls them.

    Raises:
        RequestError: another kind, no samples, or samples without a token to learn from.
    """
    expected = METHOD_KIND[config.method]
    if dataset.kind != expected:
        raise RequestError(
            f"The {name} are of kind {dataset.kind}, but the method {config.method} reads "
            f"{expected} data. Prepare them for this method."
        )
    if dataset.num_samples == 0:
        raise RequestError(f"The {name} are empty. Add samples.")
    if bool((dataset.offsets.diff() == 0).any()):
        raise RequestError(f"The {name} hold an empty sample. Prepare them again.")
    if dataset.kind != "prompt":
        is_label = dataset.loss_weights > 0
        is_label[dataset.offsets[:-1]] = False  # nothing precedes a sequence's first token
        totals = is_label.cumsum(0, dtype=torch.int32)[dataset.offsets[1:] - 1]
        num_labels = torch.diff(totals, prepend=totals.new_zeros(1))
        _refuse(num_labels == 0, dataset, name, "have no token to learn from", "Leave them out.")


def check_lengths(dataset: TokenDataset, config: TrainConfig, name: str) -> None:
    """Refuse samples that are too long for a resolved config.

    Raises:
        RequestError: names them.
    """
    assert config.max_seq_len is not None
    room, reason = config.max_seq_len, f"are longer than max_seq_len, {config.max_seq_len} tokens"
    remedy = "Shorten them or raise it."
    if config.method == "grpo":
        room -= config.max_completion_tokens
        reason = (
            f"leave no room for an answer of {config.max_completion_tokens} tokens within "
            f"max_seq_len, {config.max_seq_len}"
        )
        remedy = "Shorten them, or lower max_completion_tokens."
    _refuse(dataset.offsets.diff() > room, dataset, name, reason, remedy)


def _refuse(
    is_bad: torch.Tensor, dataset: TokenDataset, name: str, reason: str, remedy: str
) -> None:
    """Raise RequestError that names samples by number, from 1, where a sequence is bad."""
    bad = is_bad.nonzero().view(-1).tolist()
    if not bad:
        return
    per_sample = 2 if dataset.kind == "preference" else 1
    numbers = sorted({index // per_sample + 1 for index in bad})
    named = ", ".join(str(number) for number in numbers[:MAX_NAMED])
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    raise RequestError(f"In the {name} samples {named}{more} {reason}. {remedy}")


def data_digest(dataset: TokenDataset) -> str:
    """Of the training data: with others it would be another run."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (dataset.input_ids, dataset.loss_weights, dataset.offsets):
        digest.update(tensor.contiguous().numpy().data)
    digest.update(dataset.kind.encode())
    return digest.hexdigest()
