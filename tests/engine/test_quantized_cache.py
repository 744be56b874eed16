"""A 16-bit folder is quantised once; trouble with its copy is never an error."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from engine import weights
from tests.engine.tiny_models import (
    FILE,
    assert_equals_oracle,
    dense_oracle,
    load,
    random_prompts,
    run_prompts,
    save_model,
)


def test_a_16_bit_folder_is_quantised_once(tmp_path):
    save_model(tmp_path / "model", "llama3_tied", torch.bfloat16)
    stages: list[tuple[str, int, int]] = []
    config = weights.ModelConfig(base="x", quantized_cache_dir=str(tmp_path / "cache"))
    first = weights.load_model(config, tmp_path / "model", "cpu", lambda *p: stages.append(p))
    assert {stage for stage, _, _ in stages} == {"Quantising to NF4"}
    assert stages[0][1] == 0 and stages[-1][1] == stages[-1][2] > 0
    (copy,) = (tmp_path / "cache").iterdir()
    assert copy.name.startswith("model-nf4-") and str(copy) in first.notes[0]
    stages.clear()
    second = weights.load_model(config, tmp_path / "model", "cpu", lambda *p: stages.append(p))
    assert {stage for stage, _, _ in stages} == {"Loading weights"}
    assert str(copy) in second.notes[0]
    assert first.fingerprint == second.fingerprint
    assert first.weights_bytes == second.weights_bytes
    assert load(copy).fingerprint == first.fingerprint  # the copy is a checkpoint like any other
    prompts = random_prompts()
    for one, two in zip(
        run_prompts(first.model, prompts), run_prompts(second.model, prompts), strict=True
    ):
        assert torch.equal(one, two)
    assert_equals_oracle(first.model, dense_oracle(copy, torch.bfloat16))


def test_a_changed_source_is_quantised_anew(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    first = load(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / FILE)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, tmp_path / "model" / FILE)
    second = load(tmp_path / "model")
    assert first.fingerprint != second.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert load(tmp_path / "model", quantization="fp4").quantization == "fp4"
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_damaged_copy_is_made_anew(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    first = load(tmp_path / "model")
    (copy,) = (tmp_path / "cache").iterdir()
    (copy / FILE).write_bytes((copy / FILE).read_bytes()[:-100])
    second = load(tmp_path / "model")
    assert "damaged" in second.notes[0] and "truncated" in second.notes[0]
    assert second.fingerprint == first.fingerprint == load(tmp_path / "model").fingerprint


def test_a_cache_that_cannot_be_written_is_only_a_note(tmp_path, monkeypatch):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    (tmp_path / "file").write_text("not a folder")
    loaded = load(tmp_path / "model", quantized_cache_dir=str(tmp_path / "file" / "cache"))
    assert loaded.quantization == "nf4"
    assert "could not be kept" in loaded.notes[0]
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    loaded = load(tmp_path / "model")
    assert "1.0 kB free on the disk" in loaded.notes[0]
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_fills_up_is_only_a_note(tmp_path, monkeypatch):
    save_model(tmp_path / "model", "llama", torch.bfloat16)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.shard_writer.write_safetensors", fail)
    loaded = load(tmp_path / "model")
    assert "No space left on device" in loaded.notes[0]
    assert not list((tmp_path / "cache").iterdir())
    assert len(run_prompts(loaded.model, [[1, 2]])) == 1


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    load(tmp_path / "model")
    (copy,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(copy)
    leftover = copy.with_name(f".{copy.name}.partial-999999999")
    leftover.mkdir()
    load(tmp_path / "model")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [copy.name]
