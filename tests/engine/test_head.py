"""--lm-head-dtype: the head in fewer bits, tied or not, with every kind of adapter."""

import dataclasses

import pytest
import torch

from engine.errors import CheckpointError
from engine.head import dense_weight, is_copy_of, quantize_head
from engine.lora import LoraModule, LoraWeights
from engine.lora_placement import pack_adapter
from kernels.int8_linear import Int8Weight, quantize_int8
from kernels.nf4 import QuantizedWeight, quantize_4bit
from tests.engine.tiny_models import (
    load,
    random_prompts,
    run_prompts,
    save_model,
    save_with_bitsandbytes,
)

KINDS = {"int8": Int8Weight, "nf4": QuantizedWeight}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def head_of(model):
    return model.base_linear("lm_head").weight


@pytest.mark.parametrize("name", ["llama", "llama3_tied", "llama_straddling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_head_changes(name, dtype, kind, tmp_path):
    save_model(tmp_path / "model", name, dtype)
    plain = load(tmp_path / "model")
    loaded = load(tmp_path / "model", lm_head_dtype=kind)
    model = loaded.model
    assert isinstance(head_of(model), KINDS[kind])
    assert torch.equal(model.embed_tokens, plain.model.embed_tokens)
    assert loaded.fingerprint == plain.fingerprint
    assert any(kind in note for note in loaded.notes)
    expected = load(tmp_path / "model")
    expected.model.lm_head.weight = dense_weight(head_of(model)).clone()
    for actual, wanted in zip(
        run_prompts(model, random_prompts()),
        run_prompts(expected.model, random_prompts()),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", ["llama", "llama3_tied", "llama_straddling"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_bytes_counts_the_head_as_it_is_held(name, kind, tmp_path):
    save_model(tmp_path / "model", name, torch.bfloat16)
    plain = load(tmp_path / "model")
    loaded = load(tmp_path / "model", lm_head_dtype=kind)
    dense_bytes = 0 if plain.spec.tie_word_embeddings else head_of(plain.model).nbytes
    change = head_of(loaded.model).num_bytes - dense_bytes
    assert loaded.weights_bytes - plain.weights_bytes == change


def test_a_dense_model_may_have_a_small_head(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    loaded = load(tmp_path / "model", quantization="none", lm_head_dtype="nf4")
    assert loaded.quantization == "none" and isinstance(head_of(loaded.model), QuantizedWeight)


def test_a_head_that_is_4_bit_already_is_not_converted(tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(
        folder, "llama", bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["embed_tokens"]
    )
    kept = load(folder, lm_head_dtype="nf4")
    assert isinstance(head_of(kept.model), QuantizedWeight) and kept.notes == ()
    with pytest.raises(CheckpointError, match=r"head is nf4 already.*--lm-head-dtype auto"):
        load(folder, lm_head_dtype="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_head_is_named(kind):
    weight = torch.ones(4, 64)
    weight[1, 1] = float("nan")
    with pytest.raises(CheckpointError, match=f"head cannot be held in {kind}"):
        quantize_head(weight, kind)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_4bit, torch.clone])
def test_a_copy_of_the_base_is_known_from_a_trained_one(quantize):
    stored = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = quantize(stored)
    assert is_copy_of(stored, weight) and is_copy_of(stored.float(), weight)
    assert is_copy_of(dense_weight(weight), weight)
    assert not is_copy_of(stored * 1.1, weight)
    assert not is_copy_of(torch.full_like(stored, float("nan")), weight)


@pytest.mark.parametrize("name", ["llama", "llama3_tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_fit_a_small_head_as_the_large_one(name, kind, tmp_path):
    save_model(tmp_path / "model", name)
    plain, small = (load(tmp_path / "model", lm_head_dtype=k).model for k in ("auto", kind))
    rows, columns = plain.spec.embedding_shape
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    stored = dense_weight(head_of(plain)).clone()
    magnitude = torch.rand(rows, generator=generator) + 1
    low_rank = LoraModule(a=a, b=b)
    adapters = [
        LoraWeights(modules={"lm_head": low_rank}),
        LoraWeights(modules={"lm_head": low_rank}, base_copies={HEAD: stored}),
        LoraWeights(modules={"lm_head": low_rank}, base_copies={HEAD: stored + 1}),
        LoraWeights(modules={"lm_head": dataclasses.replace(low_rank, magnitude=magnitude)}),
        LoraWeights(modules={}, replaced={HEAD: stored + 1}),
    ]
    cpu = torch.device("cpu")
    for weights in adapters:
        theirs, ours = (
            pack_adapter(weights, model, torch.float32, pin_memory=False).place(cpu)
            for model in (plain, small)
        )
        assert theirs.keys() == ours.keys()
        for path, module in theirs.items():
            for field in ("a", "b", "gain", "offset", "dense"):
                expected, actual = getattr(module, field), getattr(ours[path], field)
                assert (expected is None) == (actual is None), (path, field)
                if expected is not None:
                    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
