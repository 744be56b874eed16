"""A model's tokenizer in the form that llguidance wants: the bytes of every token, and how the
model itself writes a text.

The second matters where a grammar leaves no choice: the next token is then the one with which the
model's own tokenizer would begin the forced text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.auto_tokenizer import load_auto_tokenizer
from engine.errors import CheckpointError
from engine.grammar_check import Vocabulary, load_llguidance


def load_tokenizer(folder: Path, eos_token_ids: list[int]) -> Any:
    """llguidance's view of a model's tokenizer.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return _from_transformers(folder, eos_token_ids)
    return _from_sentencepiece(folder / "tokenizer.model", eos_token_ids)


def _from_transformers(folder: Path, eos_token_ids: list[int]) -> Any:
    from llguidance import hf

    try:
        tokenizer = load_auto_tokenizer(folder)
        theirs = hf.from_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no tokenizer for structured output: {error}") from error
    tokens = [theirs.decode_bytes([token_id]) for token_id in range(theirs.vocab_size)]
    special_ids = {i for i in range(theirs.vocab_size) if theirs.is_special_token(i)}
    # The library takes every added token in angle brackets for a control token. One that is shown
    # as text, such as Qwen's <tool_call>, is text: a grammar's "<tool_call>" is this token.
    for token_id, added in tokenizer.added_tokens_decoder.items():
        if not added.special and token_id < len(tokens):
            tokens[token_id] = added.content.encode()
            special_ids.discard(token_id)
    eos_token_ids = eos_token_ids or theirs.eos_tokens
    return _make_tokenizer(tokens, special_ids, eos_token_ids, theirs.tokenize_bytes)


# ModelProto.normalizer_spec (field 3) {add_dummy_prefix (3): false, remove_extra_whitespaces (4):
# false}: behind a model's bytes these two override its own, and no space comes before a text.
_PLAIN_NORMALIZER = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])


def _from_sentencepiece(path: Path, eos_token_ids: list[int]) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=path.read_bytes() + _PLAIN_NORMALIZER)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error
    tokens: list[bytes] = []
    special_ids: set[int] = set()
    for token_id in range(len(model)):
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            tokens.append(bytes([int(piece[3:5], 16)]))
            continue
        tokens.append(piece.replace("▁", " ").encode())
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            special_ids.add(token_id)

    def encode(text: bytes) -> list[int]:
        token_ids: list[int] = model.encode(text.decode("utf-8"))
        return token_ids

    return _make_tokenizer(tokens, special_ids, eos_token_ids or [model.eos_id()], encode)


def _make_tokenizer(
    tokens: list[bytes],
    special_ids: set[int],
    eos_token_ids: list[int],
    encode: Callable[[bytes], list[int]],
) -> Any:
    """llguidance's tokenizer from the bytes of every token, those that are no text, and how the
    model's own tokenizer writes a text."""
    ids = {token: i for i, token in enumerate(tokens) if token and i not in special_ids}
    longest = max(map(len, ids))

    def encode_exactly(text: bytes) -> list[int]:
        """What a grammar forces, byte for byte; the model's way where that keeps the text."""
        token_ids = encode(text)
        is_kept = b"".join(tokens[i] for i in token_ids) == text
        if is_kept and special_ids.isdisjoint(token_ids):
            return token_ids
        token_ids, start = [], 0
        while start < len(text):  # a normaliser rewrites it: the longest tokens that fit
            ends = range(min(start + longest, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in ids), None)
            if end is None:
                break
            token_ids.append(ids[text[start:end]])
            start = end
        return token_ids

    llguidance = load_llguidance()
    vocabulary = Vocabulary(tokens, sorted(special_ids), eos_token_ids[0], encode_exactly)
    wrapped = llguidance.TokenizerWrapper(vocabulary)
    return llguidance.LLTokenizer(wrapped, eos_token=eos_token_ids)
