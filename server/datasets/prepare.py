"""A data file to token ids and loss weights, ready to train on.

Public   prepare, Prepared; DatasetErrors in server/datasets/problems.py
Formats  server/datasets/formats.py recognises them, docs/training-data.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.train.config import Method
from engine.train.token_dataset import TokenDataset
from server.chat_template import ChatTemplate
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A data file, tokenised, and what there is to say about it."""

    dataset: TokenDataset
    format: str
    """What the file was recognised as: alpaca, sharegpt ..."""
    num_samples: int
    """Of the file. A conversation may need several sequences of the data set."""
    num_tokens: int
    num_label_tokens: int
    """Tokens that are learnt; 0 where the data are prompts."""
    max_length: int
    """Tokens of the longest sequence."""
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: "1,234 samples, format alpaca, 56,789 tokens, 12,345 of them learnt"."""
        learnt = f", {self.num_label_tokens:,} of them learnt" if self.num_label_tokens else ""
        return (
            f"{self.num_samples:,} samples, format {self.format}, "
            f"{self.num_tokens:,} tokens{learnt}"
        )


def prepare(
    path: str | Path,
    *,
    method: Method,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    max_seq_len: int,
    file_name: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Prepared:
    """Read, check and tokenise a file; CPU work, call it in a thread.

    Args:
        path: JSON Lines, or one JSON array.
        method: decides which kind of data is needed.
        tokenizer, template: those that serve the model; None: it has no template, then only formats
            of plain text can be used.
        eos_token_ids: what ends an answer when the model is served (EngineInfo has them).
        vocab_size: of the model.
        max_seq_len: tokens of a sequence at most.
        file_name: what error messages call the file; its own name by default.
        on_progress: called now and then with the share (0..1) of the file that is read. What it
            raises ends the preparation.

    Raises:
        DatasetErrors: the file cannot be trained on; all problems together.
    """
    raise NotImplementedError
