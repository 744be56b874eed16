"""Loading: what transformers and bitsandbytes write, the choice of types, memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import weights
from engine.errors import CheckpointError, NotEnoughMemory
from tests.engine.tiny_models import (
    FILE,
    WEIGHT,
    assert_equals_oracle,
    dense_oracle,
    load,
    rewrite,
    save_model,
    save_with_bitsandbytes,
)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_loads_what_bitsandbytes_writes(quant_type, double_quant, storage, tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(
        folder,
        "llama",
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    loaded = load(folder)
    assert loaded.quantization == quant_type
    assert loaded.spec.dtype is torch.bfloat16
    assert_equals_oracle(loaded.model, dense_oracle(folder, torch.bfloat16))


@pytest.mark.parametrize("name", ["llama_straddling", "qwen2", "qwen3_biased", "mistral_window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loads_4_bit_checkpoints_of_each_architecture(name, dtype, tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(
        folder, name, dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    loaded = load(folder)
    assert loaded.spec.dtype is dtype
    assert_equals_oracle(loaded.model, dense_oracle(folder, dtype), dtype)


def test_modules_kept_16_bit_stay_so(tmp_path):
    folder = tmp_path / "model"
    skipped = ["lm_head", "model.layers.0.self_attn.k_proj", "down_proj"]
    save_with_bitsandbytes(
        folder, "llama_mha_untied_biases", bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped
    )
    model = load(folder).model
    assert isinstance(model.base_linear("model.layers.0.self_attn.k_proj").weight, torch.Tensor)
    assert isinstance(model.base_linear("model.layers.1.mlp.down_proj").weight, torch.Tensor)
    assert not isinstance(model.base_linear("model.layers.1.self_attn.k_proj").weight, torch.Tensor)
    assert_equals_oracle(model, dense_oracle(folder, torch.bfloat16))


def test_sharded_4_bit_checkpoints_load(tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(folder, "llama", bnb_4bit_quant_type="nf4", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_equals_oracle(load(folder).model, dense_oracle(folder, torch.bfloat16))


def test_a_4_bit_checkpoint_can_be_served_dense(tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(folder, "llama", bnb_4bit_quant_type="nf4")
    four_bit, dense = load(folder), load(folder, quantization="none")
    assert dense.quantization == "none" and dense.fingerprint == four_bit.fingerprint
    assert isinstance(dense.model.base_linear("model.layers.0.mlp.up_proj").weight, torch.Tensor)
    assert_equals_oracle(dense.model, dense_oracle(folder, torch.bfloat16))


def test_our_quantisation_is_bitsandbytes_quantisation(tmp_path):
    """The same 16-bit folder, quantised by either: equal fingerprints, so adapters fit both."""
    folder = tmp_path / "model"
    source = save_with_bitsandbytes(
        folder, "llama_straddling", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    assert load(source).fingerprint == load(folder).fingerprint


def test_early_names_of_quant_state_parts_load(tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(folder, "llama", bnb_4bit_quant_type="nf4")
    expected = load(folder).fingerprint
    tensors = load_file(folder / FILE)
    renamed = {
        name.replace(".weight.absmax", ".weight.quant_state.absmax"): t
        for name, t in tensors.items()
    }
    save_file(renamed, folder / FILE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).fingerprint == expected


def test_float16_runs_in_bfloat16_on_a_cpu_unless_told_otherwise(tmp_path):
    save_model(tmp_path / "model", "llama", torch.float16)
    auto = load(tmp_path / "model", quantization="none")
    assert auto.spec.dtype is torch.bfloat16 and "--dtype" in auto.notes[0]
    kept = load(tmp_path / "model", quantization="none", dtype="float16")
    assert kept.spec.dtype is torch.float16 and kept.notes == ()
    assert kept.fingerprint == auto.fingerprint


def test_the_type_comes_from_the_tensors_when_the_config_names_none(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    assert load(tmp_path / "model").spec.dtype is torch.bfloat16


def test_weights_bytes_is_what_the_tensors_take(tmp_path):
    for name, flag in (("llama_straddling", "nf4"), ("qwen3", "none"), ("qwen2", "fp4")):
        save_model(tmp_path / name, name, torch.bfloat16)
        loaded = load(tmp_path / name, quantization=flag)
        model = loaded.model
        tensors = {model.embed_tokens, model.norm}
        for layer in model.layers:
            tensors |= {layer.input_layernorm, layer.post_attention_layernorm}
            tensors |= {norm for norm in (layer.q_norm, layer.k_norm) if norm is not None}
        total = sum(tensor.nbytes for tensor in tensors)
        for path in model.spec.linear_shapes():
            part = model.base_linear(path)
            if part.weight is not model.embed_tokens:
                total += (
                    part.weight.nbytes
                    if isinstance(part.weight, torch.Tensor)
                    else part.weight.num_bytes
                )
            total += part.bias.nbytes if part.bias is not None else 0
        assert loaded.weights_bytes == total


def test_nan_in_a_weight_is_named_when_quantising(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)

    def change(tensors):
        tensors[WEIGHT][3, 3] = float("nan")

    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=f"tensor {WEIGHT} cannot be quantised: .*NaN"):
        load(tmp_path / "model")
    assert not list((tmp_path / "cache").iterdir())


def test_too_little_memory_is_refused_before_loading(tmp_path, monkeypatch):
    save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(weights, "available_host_bytes", lambda: 100_000)
    monkeypatch.setattr(weights, "read_tensors", None)  # would fail if it were reached
    with pytest.raises(NotEnoughMemory, match=r"needs \d+\.\d kB of host memory.*only 100.0 kB"):
        load(tmp_path / "model", quantization="none")


def test_unknown_memory_refuses_nothing(tmp_path, monkeypatch):
    save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(weights, "available_host_bytes", lambda: None)
    load(tmp_path / "model", quantization="none")
