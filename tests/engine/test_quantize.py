"""quantize_checkpoint writes what transformers and bitsandbytes load, and nothing by halves."""

import json
import shutil

import bitsandbytes
import pytest
import torch
import transformers
from safetensors import safe_open

from engine.errors import CheckpointError
from engine.quantize import quantize_checkpoint
from tests.engine.tiny_models import (
    dense_oracle,
    load,
    oracle_logits,
    random_prompts,
    run_prompts,
    save_model,
)


def transformers_model(folder):
    """Loaded by transformers and bitsandbytes; train mode keeps the weights as stored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.train()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_loads_it_with_the_same_logits(quant_type, double_quant, tmp_path):
    save_model(tmp_path / "src", "llama", hidden_size=128, intermediate_size=192)
    quantize_checkpoint(
        tmp_path / "src", tmp_path / "dst", quant_type=quant_type, double_quant=double_quant
    )
    theirs = transformers_model(tmp_path / "dst")
    layer = theirs.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.quant_state.quant_type == quant_type
    assert layer.weight.quant_state.nested is double_quant
    loaded = load(tmp_path / "dst")
    assert loaded.quantization == quant_type
    prompts = random_prompts()
    actual, expected = run_prompts(loaded.model, prompts), oracle_logits(theirs, prompts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral_window", "llama_mha_untied_biases"])
def test_every_architecture_survives_the_round_trip(name, tmp_path):
    save_model(tmp_path / "src", name, intermediate_size=128)
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    prompts = random_prompts()
    expected = oracle_logits(transformers_model(tmp_path / "dst"), prompts)
    actual = run_prompts(load(tmp_path / "dst").model, prompts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_straddling", "qwen3_biased"])
def test_widths_that_are_no_multiple_of_64_follow_the_formula(name, tmp_path):
    """bitsandbytes loads them, but its CPU kernels take wrong scales where groups straddle rows."""
    save_model(tmp_path / "src", name)
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    transformers_model(tmp_path / "dst")
    prompts = random_prompts()
    expected = oracle_logits(dense_oracle(tmp_path / "dst", torch.float32), prompts)
    actual = run_prompts(load(tmp_path / "dst").model, prompts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_files_equal_what_transformers_writes(tmp_path):
    """Names, types, shapes and bytes of every tensor, and config.json's quantization_config."""
    save_model(tmp_path / "src", "llama3_tied", torch.bfloat16)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", quantization_config=settings
    )
    model.save_pretrained(tmp_path / "theirs")
    quantize_checkpoint(tmp_path / "src", tmp_path / "ours")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
    ):
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118, no dict
            one, two = ours.get_tensor(name), theirs.get_tensor(name)
            if "quant_state.bitsandbytes" in name:
                one, two = (json.loads(t.numpy().tobytes()) for t in (one, two))
                assert one.pop("nested_offset") == pytest.approx(two.pop("nested_offset"), rel=1e-6)
                assert one == two
            else:
                assert one.dtype == two.dtype and torch.equal(one, two), name


def test_large_models_are_split_into_files(tmp_path):
    save_model(tmp_path / "src", "llama")
    quantize_checkpoint(tmp_path / "src", tmp_path / "one")
    quantize_checkpoint(tmp_path / "src", tmp_path / "many", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        with safe_open(tmp_path / "many" / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, no dict
                assert index["weight_map"][name] == file
                total += shard.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == total
    assert load(tmp_path / "many").fingerprint == load(tmp_path / "one").fingerprint
    assert load(tmp_path / "src").fingerprint == load(tmp_path / "one").fingerprint
    transformers_model(tmp_path / "many")


def test_companions_are_copied_and_weights_are_not(tmp_path):
    save_model(tmp_path / "src", "llama")
    copied = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    left = ["pytorch_model.bin", "modeling_evil.py", "model.safetensors.index.json"]
    for name in copied + left:
        (tmp_path / "src" / name).write_text("{}")
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names == {*copied, "config.json", "generation_config.json", "model.safetensors"}


def test_progress_is_told_in_bytes(tmp_path):
    save_model(tmp_path / "src", "llama")
    calls = []
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst", progress=lambda *c: calls.append(c))
    assert {stage for stage, _, _ in calls} == {"Quantising to NF4"}
    done = [count for _, count, _ in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == calls[0][2]


def test_refuses_a_destination_in_use(tmp_path):
    save_model(tmp_path / "src", "llama")
    (tmp_path / "dst").mkdir()
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")  # an empty folder is fine
    before = sorted(path.name for path in (tmp_path / "dst").iterdir())
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == before
    with pytest.raises(CheckpointError, match="holds 4-bit weights already"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_refuses_an_unknown_type(tmp_path):
    with pytest.raises(ValueError, match="quant_type: expected nf4 or fp4, got 'int4'"):
        quantize_checkpoint(tmp_path, tmp_path / "dst", quant_type="int4")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    save_model(tmp_path / "src", "llama")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.shard_writer.write_safetensors", fail)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left.*Free some"):
            quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
        with pytest.raises(CheckpointError, match="10 bytes free on the disk"):
            quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_config_without_a_dtype_gets_one(tmp_path):
    save_model(tmp_path / "src", "llama", torch.bfloat16)
    path = tmp_path / "src" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert transformers_model(tmp_path / "dst").dtype is torch.bfloat16
