"""Tokenised training data: what the HTTP process writes and the trainer reads.

Format   one safetensors file: input_ids int32 [num_tokens], loss_weights float32 [num_tokens],
         offsets int64 [num_sequences + 1]; metadata {"kind": ..., "format": "herd-tokens-1"}.
Kinds    supervised: a sequence is a sample, a token with weight w adds w times its loss.
         preference: sequences 2i and 2i + 1 are the better and the worse answer to the same prompt,
         weights are 1 on the answers' tokens.
         prompt: a sequence is what a policy answers; the weights are 0.
A loss weight belongs to the token that is predicted: weight 1 at t means that t is learnt from
what precedes it, so a sequence's first weight has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.errors import EngineError

Kind = Literal["supervised", "preference", "prompt"]
FORMAT = "herd-tokens-1"
METHOD_KIND: dict[str, Kind] = {
    "supervised": "supervised",
    "reward": "preference",
    "dpo": "preference",
    "grpo": "prompt",
}
"""What each training method reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDataset:
    """All sequences of a data set, end to end."""

    kind: Kind
    input_ids: torch.Tensor
    """int32 [num_tokens]."""
    loss_weights: torch.Tensor
    """float32 [num_tokens]."""
    offsets: torch.Tensor
    """int64 [num_sequences + 1]; sequence i is input_ids[offsets[i] : offsets[i + 1]]."""

    @property
    def num_samples(self) -> int:
        """Sequences, or pairs of them where the data are preferences."""
        num_sequences = self.offsets.numel() - 1
        return num_sequences // 2 if self.kind == "preference" else num_sequences

    def sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids int32 [length], loss_weights float32 [length]) of one sequence."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.input_ids[start:stop], self.loss_weights[start:stop]


def make_dataset(kind: Kind, sequences: Iterable[tuple[list[int], list[float]]]) -> TokenDataset:
    """Join (token ids, loss weights) of each sequence."""
    ids, weights, lengths = [], [], [0]
    for input_ids, loss_weights in sequences:
        assert len(input_ids) == len(loss_weights), "a token without a weight"
        ids.append(torch.tensor(input_ids, dtype=torch.int32))
        weights.append(torch.tensor(loss_weights, dtype=torch.float32))
        lengths.append(len(input_ids))
    assert kind != "preference" or len(ids) % 2 == 0, "an answer without its other"
    return TokenDataset(
        kind=kind,
        input_ids=torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32),
        loss_weights=torch.cat(weights) if weights else torch.empty(0),
        offsets=torch.tensor(lengths, dtype=torch.int64).cumsum(0),
    )


def save_dataset(path: str | Path, dataset: TokenDataset) -> None:
    """Write a data set; the file appears whole or not at all."""
    unfinished = Path(f"{path}.tmp")
    tensors = {name: getattr(dataset, name) for name in ("input_ids", "loss_weights", "offsets")}
    save_file(tensors, unfinished, metadata={"format": FORMAT, "kind": dataset.kind})
    unfinished.replace(path)


def load_dataset(path: str | Path) -> TokenDataset:
    """Read what save_dataset wrote.

    Raises:
        EngineError: the file is not there, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EngineError(
                    f"{path}: expected training data of format {FORMAT!r}, found "
                    f"{metadata.get('format')!r}. Prepare the data again."
                )
            return TokenDataset(
                kind=cast(Kind, metadata["kind"]),
                input_ids=file.get_tensor("input_ids"),
                loss_weights=file.get_tensor("loss_weights"),
                offsets=file.get_tensor("offsets"),
            )
    except (OSError, SafetensorError) as error:
        raise EngineError(
            f"{path}: training data cannot be read: {error}. Prepare the data again."
        ) from error
