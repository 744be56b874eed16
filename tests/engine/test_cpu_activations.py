"""--cpu-activations int8: honoured where a kernel does it, refused elsewhere."""

import pytest
import torch

from engine import weights
from engine.errors import CheckpointError
from tests.engine.tiny_models import (
    load,
    random_prompts,
    run_prompts,
    save_model,
    save_with_bitsandbytes,
)


def quantized_weights(model):
    for path in model.spec.linear_shapes():
        if path != "lm_head":
            yield model.base_linear(path).weight


def test_full_is_the_default(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    loaded = load(tmp_path / "model", quantization="nf4")
    assert not any(weight.int8_activations for weight in quantized_weights(loaded.model))
    assert not any("--cpu-activations" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["llama", "llama3_tied"])
def test_int8_is_near_full_and_said_at_the_start(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "has_int8_activations", lambda: True)  # or the reference does it
    save_model(tmp_path / "model", name, torch.bfloat16)
    full = load(tmp_path / "model", quantization="nf4")
    loaded = load(tmp_path / "model", quantization="nf4", cpu_activations="int8")
    for weight in quantized_weights(loaded.model):
        assert weight.int8_activations == (weight.shape[1] % 64 == 0)  # else groups span rows
    assert loaded.fingerprint == full.fingerprint
    assert any("--cpu-activations int8" in note for note in loaded.notes)
    prompts = random_prompts()
    for actual, wanted in zip(
        run_prompts(loaded.model, prompts), run_prompts(full.model, prompts), strict=True
    ):
        assert not torch.equal(actual, wanted)
        assert (actual - wanted).norm() < 0.1 * wanted.norm()


def test_a_4_bit_head_is_multiplied_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "has_int8_activations", lambda: True)
    save_with_bitsandbytes(
        tmp_path / "model",
        "llama",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["embed_tokens"],
    )
    model = load(tmp_path / "model", cpu_activations="int8").model
    assert not model.base_linear("lm_head").weight.int8_activations
    assert any(weight.int8_activations for weight in quantized_weights(model))


def test_int8_without_4_bit_weights_is_refused(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"--quantization none has none\. Leave the flag"):
        load(tmp_path / "model", quantization="none", cpu_activations="int8")


def test_int8_for_a_model_without_whole_groups_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "has_int8_activations", lambda: True)
    save_model(tmp_path / "model", "llama_straddling", torch.bfloat16)
    with pytest.raises(CheckpointError, match="no weight of this model has rows of whole groups"):
        load(tmp_path / "model", quantization="nf4", cpu_activations="int8")


def test_int8_without_a_kernel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "has_int8_activations", lambda: False)
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    with pytest.raises(CheckpointError, match="no AVX-512 VNNI and BF16"):
        load(tmp_path / "model", quantization="nf4", cpu_activations="int8")
