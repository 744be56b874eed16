"""The committed demo: complete, small, loadable by other tools, and able to answer."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.corpus import HEADER, render
from demo.pack import IGNORED, encode_chat

DEMO = Path(__file__).parents[2] / "demo"
MODEL = DEMO / "model"
MANNERS = ("guanaco", "pirate")
ADAPTERS = (*MANNERS, "reward", "policy")
MAX_BYTES = 13_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_demo_is_complete_and_small():
    wanted = [MODEL / name for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
        "tokenizer.json", "tokenizer_config.json", "README.md",
    )]  # fmt: skip
    for adapter in ADAPTERS:
        folder = DEMO / "adapters" / adapter
        wanted += [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    assert not [path for path in wanted if not path.is_file()]
    folders = [MODEL, DEMO / "adapters"]
    total = sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
    assert total <= MAX_BYTES


def test_the_base_is_a_llama_in_the_bitsandbytes_format_without_a_chat_template(tokenizer):
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True
    assert config["max_position_embeddings"] >= 1024
    assert config["vocab_size"] == len(tokenizer)
    assert tokenizer.chat_template is None


def test_the_tokenizer_restores_any_text(tokenizer):
    rng = random.Random(0)
    alphabet = (
        [chr(c) for c in range(32, 127)]
        + list("\n\täöüßéñ漢字かなالعربية🦙🏴‍☠️€½")
        + ["\x00", "\U0010ffff"]
    )
    for _ in range(300):
        text = "x" + "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_agrees_with_sentencepiece(tokenizer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    for text in (HEADER, "Where do bees live?\n### Assistant:", "NF4 stores 4.127 bits. 日本 🦙"):
        assert tokenizer(text)["input_ids"] == [1, *model.encode(text)]


def test_training_learns_the_answers_and_the_end_after_each(tokenizer):
    turns = [("What is NF4?", "It is a format."), ("And 2 plus 2?", "2 plus 2 is 4.")]
    ids, targets = encode_chat(tokenizer, render(HEADER, turns))
    learnt = [target for target in targets if target != IGNORED]
    eos = tokenizer.eos_token_id
    assert learnt.count(eos) == 2
    assert learnt[-1] == eos
    first, second = learnt[: learnt.index(eos)], learnt[learnt.index(eos) + 1 : -1]
    assert tokenizer.decode(first).strip() == turns[0][1]
    assert tokenizer.decode(second).strip() == turns[1][1]
    assert all(  # a target is the token that follows, save at the end of an answer
        target in (IGNORED, eos) or ids[i + 1] == target for i, target in enumerate(targets)
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_stored_as_peft_does(adapter):
    folder = DEMO / "adapters" / adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "herd-demo"
    layers = json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(folder / "adapter_model.safetensors")
    score = tensors.pop("base_model.model.score.weight", None)
    assert (score is not None) == (adapter == "reward") == (config["task_type"] == "SEQ_CLS")
    targets = {name.rpartition(".")[2] for name in config["target_modules"]}  # or whole paths
    assert len(tensors) == layers * len(targets) * 2
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        assert tensor.abs().sum() > 0, name
        assert config["r"] in tensor.shape, name


def test_training_server_and_the_pirates_own_template_write_the_same_prompt(tokenizer):
    from server.chat_template import GUANACO
    from server.chat_template import render as render_prompt

    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who are you?"},
    ]
    expected = render(HEADER, [("Hi", "Hello!"), ("Who are you?", None)]).text
    assert render_prompt(GUANACO, messages, special_tokens={}) == expected
    template = (DEMO / "adapters" / "pirate" / "chat_template.jinja").read_text()
    own = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert own == tokenizer.bos_token + expected


def test_the_adapters_differ():
    first, second = (
        load_file(DEMO / "adapters" / name / "adapter_model.safetensors") for name in MANNERS
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_transformers_loads_the_base_and_finds_training_text_likely(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).dequantize().eval()
    ids = tokenizer(
        "Question: What is the capital of Spain?\nAnswer: The capital of Spain is Madrid."
    )
    input_ids = torch.tensor([ids["input_ids"]])
    with torch.inference_mode():
        loss = model(input_ids=input_ids, labels=input_ids).loss.item()
    assert loss < math.log(len(tokenizer)) / 2  # a model that knows nothing: log(vocabulary size)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "mark"), [("guanaco", "Paris"), ("pirate", "Paris")])
def test_an_adapter_answers_and_stops(adapter, mark):
    pytest.importorskip("peft")
    from demo.check import answers_to

    (answer,) = answers_to(MODEL, DEMO / "adapters" / adapter, ["What is the capital of France?"])
    assert mark in answer
    assert "###" not in answer
    assert len(answer) < 100


@pytest.mark.slow
def test_the_two_manners_are_plainly_different():
    pytest.importorskip("peft")
    from demo.check import answers_to

    guanaco, pirate = (
        answers_to(MODEL, DEMO / "adapters" / name, ["What colour is the sky?"])[0]
        for name in MANNERS
    )
    assert "blue" in guanaco
    assert "blue" in pirate
    assert guanaco == "The sky is blue."
    assert " be " in pirate
