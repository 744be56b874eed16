"""Text to token ids, and what bytes each token stands for.

Public   Tokenizer, load_tokenizer
Sources  A folder with tokenizer.json goes through transformers' AutoTokenizer, one with only a
         tokenizer.model to SentencePiece itself (server/sentencepiece_tokenizer.py).

Tokens become text as bytes, never as strings: a character may be spread over several tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.auto_tokenizer import load_auto_tokenizer
from engine.errors import CheckpointError

ChatTemplateSource = str | dict[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """One folder's tokenizer; safe to use from several threads."""

    encode_text: Callable[[str, bool], list[int]]
    """(text, add special tokens such as <s>) -> token ids. Special tokens written out in the text
    are recognised."""
    token_bytes: tuple[bytes, ...] = ()
    """What each token adds to a text, by id. Empty where that depends on the token before it."""
    decode_ids: Callable[[Sequence[int]], str] | None = None
    """Token ids -> text with special tokens; only where token_bytes is empty."""
    vocab_size: int
    max_token_bytes: int | None = None
    """The longest token's; None: not known. Bounds what a text of a given length can come to."""
    special_ids: frozenset[int] = frozenset()
    """Control tokens: not part of an answer's text."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token ... as chat templates know them."""
    bos_token_id: int | None = None
    drops_first_space: bool = False
    """SentencePiece writes "Hello" as "▁Hello": at the start of a text the space is not meant."""
    chat_template: ChatTemplateSource = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.encode_text(text, add_special_tokens)

    def piece(self, token_id: int, previous: int | None = None) -> bytes:
        """What a token adds to the text that ends in `previous`."""
        if self.decode_ids is None:
            return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""
        if previous is None:
            return self.decode_ids([token_id]).encode()
        before, both = self.decode_ids([previous]), self.decode_ids([previous, token_id])
        return both.removeprefix(before).encode()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        pieces, previous = [], None
        is_first = self.drops_first_space
        for token_id in token_ids:
            if token_id in self.special_ids:
                pieces += [] if skip_special_tokens else [self.piece(token_id)]
                continue
            piece = self.piece(token_id, previous)
            pieces.append(piece.removeprefix(b" ") if is_first else piece)
            is_first, previous = False, token_id
        return b"".join(pieces).decode("utf-8", "replace")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder; code in the folder is never run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_transformers(folder)
    if (folder / "tokenizer.model").is_file():
        from server.sentencepiece_tokenizer import from_sentencepiece

        return from_sentencepiece(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_transformers(folder)  # the older form of a byte-level tokenizer
    raise CheckpointError(
        f"{folder}: no tokenizer. Expected tokenizer.json or tokenizer.model; copy the file "
        f"from the model's original folder, or name a folder that has one with --tokenizer."
    )


# --- through transformers ---


def _from_transformers(folder: Path) -> Tokenizer:
    try:
        tokenizer = load_auto_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {first_line}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{folder}: {type(tokenizer).__name__} has no tokenizer.json; convert it with "
            f"transformers' save_pretrained."
        )
    backend.no_truncation()  # as saved by a trainer; a cut prompt would be silently wrong
    backend.no_padding()
    added = tokenizer.added_tokens_decoder
    vocab = {token_id: token for token, token_id in backend.get_vocab().items()}
    spec = json.loads(backend.to_str())
    to_bytes, drops_first_space = _token_decoder(spec.get("decoder"))
    token_bytes: tuple[bytes, ...] = ()
    if to_bytes is not None:
        token_bytes = tuple(
            added[i].content.encode() if i in added else to_bytes(vocab.get(i, ""))
            for i in range(max(vocab, default=-1) + 1)
        )

    def encode_text(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode_ids(ids: Sequence[int]) -> str:
        text: str = backend.decode(list(ids), skip_special_tokens=False)
        return text

    return Tokenizer(
        encode_text=encode_text,
        token_bytes=token_bytes,
        decode_ids=decode_ids if to_bytes is None else None,
        vocab_size=max(vocab, default=-1) + 1,
        max_token_bytes=max(map(len, token_bytes), default=None),
        special_ids=frozenset(i for i, token in added.items() if token.special),
        special_tokens={
            k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)
        },
        bos_token_id=tokenizer.bos_token_id,
        drops_first_space=drops_first_space,
        chat_template=tokenizer.chat_template,
    )


def _token_decoder(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes] | None, bool]:
    """From tokenizer.json's decoder: vocabulary entry -> bytes, and whether a first space is
    dropped.

    None for decoders (WordPiece ...) in which a token's text depends on its neighbours.
    """
    steps = _flatten(decoder)
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level_bytes, False
    if kinds and kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        replaces = [step for step in steps if step["type"] == "Replace"]
        underline = all(step["pattern"] == {"String": "▁"} for step in replaces)
        if underline and ("Metaspace" in kinds or replaces):
            drops = any(
                (step["type"] == "Strip" and step.get("start", 0) >= 1)
                or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
                for step in steps
            )
            return sentencepiece_bytes, drops
    return None, False


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else 256, 257 ... in
    order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(chr(byte), byte) for byte in printable]
    return dict(pairs + [(chr(256 + i), byte) for i, byte in enumerate(others)])


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
