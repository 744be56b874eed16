"""The tokenizer is AutoTokenizer's own, found without importing what only the model would need."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.auto_tokenizer import _general_config, load_auto_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Hello  wörld\n12"


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer without a config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def name(folder, model_type, tokenizer_class, **others):
    """Write what the folder says of its model and of its tokenizer."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": tokenizer_class, **others}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def assert_same(folder):
    ours, theirs = load_auto_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "tokenizer_class",
    ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer", None],
)
def test_it_is_the_one_that_transformers_chooses(model_type, tokenizer_class, folder):
    name(folder, model_type, tokenizer_class)
    assert (_general_config(folder) is None) == (tokenizer_class is None)
    assert_same(folder)


def test_the_demo_and_its_tokenizers_model_alone(tmp_path):
    assert_same(ROOT / "demo" / "model")
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(ROOT / "demo" / "model" / file, tmp_path)
    (tmp_path / "config.json").unlink()
    assert_same(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"model_type": 3}', "[]", "{"])
def test_a_config_that_says_nothing_is_left_to_transformers(text, folder):
    name(folder, "llama", "PreTrainedTokenizerFast")
    (folder / "config.json").write_text(text)
    assert _general_config(folder) is None


def test_code_in_the_folder_is_left_to_transformers_to_refuse(folder):
    name(folder, "llama", "Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    assert _general_config(folder) is None


def test_neither_compiler_nor_algebra_is_imported():
    code = (
        "import sys; from pathlib import Path; from engine.auto_tokenizer import *; "
        "load_auto_tokenizer(Path('demo/model')); "
        "print([m for m in ('triton', 'sympy', 'torch._dynamo') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
