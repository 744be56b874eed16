"""Folders that hold a plain tokenizer.model: SentencePiece itself, and control tokens beside it.

transformers 5 needs protobuf to convert such a file, and without a tokenizer_config.json its
conversion adds neither <s> nor the space that SentencePiece puts before a text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from server.tokenizer import ChatTemplateSource, Tokenizer, sentencepiece_bytes

# ModelProto.normalizer_spec (field 3) with add_dummy_prefix (field 3) = false. Appended to a model
# it
# overrides that one setting: protobuf merges repeated occurrences of a message.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3 | 0, 0])


def from_sentencepiece(folder: Path) -> Tokenizer:
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
            " ⁇ ".encode() if first.is_unknown(i) else sentencepiece_bytes(first.id_to_piece(i))
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
        max_token_bytes=max(map(len, token_bytes)),
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
