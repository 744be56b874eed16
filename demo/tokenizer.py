"""The demo's SentencePiece tokenizer: LLaMA's conventions at 4,096 pieces.

Layout   <unk> 0, <s> 1, </s> 2, then the 256 byte pieces, so that any text can be encoded; digits
         stand alone, text is not normalised, a leading space is a part of the word's piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from transformers import LlamaTokenizer

VOCAB_SIZE = 4096


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write tokenizer.model, and what transformers' AutoTokenizer needs to load the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,  # a short corpus may not have so many pieces
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    tokenizer = LlamaTokenizer(
        vocab=pieces,
        merges=_merges(model),
        add_bos_token=True,
        model_max_length=1024,
    )
    tokenizer.save_pretrained(folder)  # tokenizer.json, which needs no protobuf to be read
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {"add_bos_token": True, "add_eos_token": False}  # not saved by itself
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _merges(model: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """The pairs that make each piece, in the order in which SentencePiece learnt the pieces.

    Where several pairs make one piece, the pair of the earlier pieces comes first.
    """
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size()) if not model.is_byte(i)}
    merges = []
    for piece, rank in ids.items():  # ids of learnt pieces grow in the order of learning
        if model.is_control(rank) or model.is_unknown(rank):
            continue
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
