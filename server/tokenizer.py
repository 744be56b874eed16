"""Text to token ids, and what bytes each token stands for.

Public   Tokenizer, load_tokenizer
Sources  A folder with tokenizer.json goes through transformers' AutoTokenizer. A folder with only
         a tokenizer.model goes to SentencePiece itself: transformers 5 needs protobuf to convert
         one, and the conversion treats leading spaces and control tokens otherwise.

Tokens become text as bytes, never as strings: a character may be spread over several tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        return _from_sentencepiece(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_transformers(folder)  # the older form of a byte-level tokenizer
    raise CheckpointError(
        f"{folder}: no tokenizer. Expected tokenizer.json or tokenizer.model; copy the file "
        f"from the model's original folder, or name a folder that has one with --tokenizer."
    )


# --- through transformers ---


def _from_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
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
            return _sentencepiece_bytes, drops
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


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


# --- SentencePiece itself ---


# ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3) = false. Appended to a model
# it
# overrides that one setting: protobuf merges repeated occurrences of a message.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3 | 0, 0])


def _from_sentencepiece(folder: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    path = folder / "tokenizer.model"
    config = _read_json(folder / "tokenizer_config.json")
    try:
        model = path.read_bytes()
        first = SentencePieceProcessor(model_proto=model)
        inner = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error

    control = {i: first.id_to_piece(i) for i in range(len(first)) if first.is_control(i)}
    added, special_ids = _added_tokens(config, folder)
    special = {**control, **added}
    id_of = {content: token_id for token_id, content in special.items()}
    longest_first = sorted(id_of, key=len, reverse=True)
    splitter = re.compile("|".join(map(re.escape, longest_first))) if id_of else None
    bos = first.bos_id() if config.get("add_bos_token", True) and first.bos_id() >= 0 else None
    eos = first.eos_id() if config.get("add_eos_token", False) and first.eos_id() >= 0 else None

    def encode_text(text: str, add_special_tokens: bool) -> list[int]:
        # Behind a special token the text goes on: no dummy space (transformers' legacy=False).
        ids = [bos] if add_special_tokens and bos is not None else []
        position = 0
        for match in splitter.finditer(text) if splitter else ():
            if match.start() > position:
                ids += (inner if position else first).encode(text[position : match.start()])
            ids.append(id_of[match[0]])
            position = match.end()
        if position < len(text):
            ids += (inner if position else first).encode(text[position:])
        return ids + ([eos] if add_special_tokens and eos is not None else [])

    size = max([len(first) - 1, *added]) + 1
    token_bytes = [b""] * size
    for i in range(len(first)):
        token_bytes[i] = (
            " ⁇ ".encode() if first.is_unknown(i) else _sentencepiece_bytes(first.id_to_piece(i))
        )
    for i, content in special.items():
        token_bytes[i] = content.encode()
    names = {"bos_token": first.bos_id(), "eos_token": first.eos_id(), "pad_token": first.pad_id()}
    special_tokens = {name: first.id_to_piece(i) for name, i in names.items() if i >= 0}
    special_tokens |= {
        name: _content(value)
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    return Tokenizer(
        encode_text=encode_text,
        token_bytes=tuple(token_bytes),
        vocab_size=size,
        special_ids=frozenset(control) | special_ids,
        special_tokens=special_tokens,
        bos_token_id=first.bos_id() if first.bos_id() >= 0 else None,
        drops_first_space=first.encode("a", out_type=str)[0].startswith("▁"),
        chat_template=_template_of(folder, config),
    )


def _added_tokens(config: dict[str, Any], folder: Path) -> tuple[dict[int, str], frozenset[int]]:
    """Tokens beyond SentencePiece's: id -> content, and the ids of those that are control
    tokens."""
    added: dict[int, str] = {}
    special: set[int] = set()
    for key, token in config.get("added_tokens_decoder", {}).items():
        added[int(key)] = _content(token)
        if isinstance(token, dict) and token.get("special"):
            special.add(int(key))
    for content, token_id in _read_json(folder / "added_tokens.json").items():
        added.setdefault(int(token_id), content)
    return added, frozenset(special)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _template_of(folder: Path, config: dict[str, Any]) -> ChatTemplateSource:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
