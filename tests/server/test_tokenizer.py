"""Tokenizers of real folders: bytes per token, against transformers and SentencePiece."""

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import CheckpointError
from server.text import Detokenizer
from server.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = [
    "the quick brown fox",
    "jumps over the lazy dog",
    "größer als 日本語 🦙",
    "a b  c   d\n\te",
]


def save(folder: Path, backend: Tokenizer, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return save(tmp_path_factory.mktemp("byte_level"), backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> Path:
    """As LLaMA's tokenizer.json: metaspace, byte fallback, the first space stripped."""
    model = train_sentencepiece(model_type="bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(len(processor))}
    pairs = [
        (left, piece[len(left) :])
        for piece in vocab
        for left in (piece[:n] for n in range(1, len(piece)))
        if left in vocab and piece[len(left) :] in vocab
    ]
    merges = sorted(pairs, key=lambda pair: vocab["".join(pair)])
    backend = Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return save(tmp_path_factory.mktemp("fallback"), backend, bos_token="<s>", eos_token="</s>")


def train_sentencepiece(**options) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=out, vocab_size=320, byte_fallback=True,
        character_coverage=0.98, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def plain(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(f"plain_{request.param}")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(model_type=request.param))
    return folder


TEXTS = st.text(alphabet="the quickbrownfoxß日本🦙 \n\t.", max_size=40)


def streamed(tokenizer, token_ids) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_streamed_text_is_what_transformers_decodes(kind, request):
    folder = request.getfixturevalue(kind)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def check(text):
        token_ids = ours.encode(text, add_special_tokens=True)
        assert token_ids == theirs(text).input_ids
        expected = theirs.decode(token_ids, skip_special_tokens=True)
        assert streamed(ours, token_ids) == expected
        assert ours.decode(token_ids, skip_special_tokens=True) == expected

    check()


def test_plain_tokenizer_model_is_sentencepiece_itself(plain):
    ours = load_tokenizer(plain)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def check(text):
        token_ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == [theirs.bos_id(), *token_ids]
        assert streamed(ours, token_ids) == theirs.decode(token_ids)

    check()


def test_control_tokens_written_out_are_recognised(plain):
    tokenizer = load_tokenizer(plain)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(plain / "tokenizer.model"))
    token_ids = tokenizer.encode("<s>the fox</s>", add_special_tokens=False)
    assert token_ids[0] == theirs.bos_id()
    assert token_ids[-1] == theirs.eos_id()
    # Behind <s> the text goes on without the space that SentencePiece puts before a text.
    assert theirs.decode(token_ids[1:2])[0] == "t"
    assert tokenizer.piece(token_ids[1])[:1] == b"t"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>the fox</s>"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_plain_folder_settings_come_from_its_config(plain, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((plain / "tokenizer.model").read_bytes())
    config = {
        "add_bos_token": False,
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {"320": {"content": "<|im_end|>", "special": True}},
        "chat_template": "{{ messages }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    token_ids = tokenizer.encode("fox<|im_end|>", add_special_tokens=True)
    assert token_ids[-1] == 320
    assert tokenizer.bos_token_id not in token_ids
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "fox"
    assert tokenizer.chat_template == "{{ messages }}"


def test_llama_tokenizer_equals_sentencepiece():
    path = Path(os.environ.get("HERD_TEST_DATA", ROOT.parent / "shared" / "data"))
    model = path / "llama-tokenizer.model"
    if not model.is_file():
        pytest.skip(f"{model} is not there; name its folder with HERD_TEST_DATA")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.read_bytes())
        ours = load_tokenizer(Path(folder))
    for text in ("Hello world", " Hello", "  two", "a\nb", "日本語 🦙", "", "\tx", "a  b   c"):
        token_ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == [1, *token_ids]
        assert streamed(ours, token_ids) == text
    assert ours.encode("<s>[INST] x", add_special_tokens=False)[:2] == [1, 29961]  # "[", not "▁["


def test_added_tokens_are_bytes_as_they_are(byte_level):
    tokenizer = load_tokenizer(byte_level)
    tool = tokenizer.encode("<tool>", add_special_tokens=False)
    end = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert (len(tool), len(end)) == (1, 1)
    assert tokenizer.piece(tool[0]) == b"<tool>"
    assert tool[0] not in tokenizer.special_ids
    assert end[0] in tokenizer.special_ids


def test_saved_truncation_and_padding_do_not_cut_prompts(byte_level, tmp_path):
    for file in byte_level.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(tmp_path).encode("jumps over it", add_special_tokens=False)) > 2


def test_tokens_without_bytes_of_their_own_are_read_in_context(tmp_path):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = load_tokenizer(save(tmp_path, backend))
    assert tokenizer.encode("hello world", add_special_tokens=False) == [1, 2]
    assert streamed(tokenizer, [1, 2, 1]) == "hello world hello"
    assert tokenizer.piece(2) == b"world"


def test_the_older_form_of_a_byte_level_tokenizer(byte_level, tmp_path):
    """vocab.json and merges.txt, as Qwen2's first checkpoints have them."""
    model = json.loads((byte_level / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    token_ids = tokenizer.encode("quick größer", add_special_tokens=False)
    assert len(token_ids) < len("quick größer".encode())
    assert streamed(tokenizer, token_ids) == "quick größer"


def test_a_folder_without_tokenizer_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer.*tokenizer\.json.*--tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_names_the_file(tmp_path, name):
    (tmp_path / name).write_text("{broken")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
