"""An embedding that is left in its file gives the numbers of one in memory, or says why not."""

import dataclasses
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import embedding
from engine.checkpoint import Checkpoint
from engine.embedding import StoredTable, can_stay, look_up, whole_table
from engine.errors import EngineError
from engine.lora import LoraModule, LoraWeights
from engine.lora_placement import pack_adapter
from engine.safetensors_header import TensorInfo
from engine.train.layer_pass import embed
from tests.engine.tiny_models import (
    FILE,
    load,
    random_prompts,
    run_prompts,
    save_model,
    save_with_bitsandbytes,
)

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def small_tables_stay(monkeypatch):
    """Tables of any size are left on the disk, whatever disk the test has."""
    monkeypatch.setattr(embedding, "MIN_STORED_BYTES", 0)
    monkeypatch.setattr(embedding, "_is_on_disk", lambda _: True)


def stored_table(folder, values, dtype=None):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"other": torch.ones(3), EMBEDDING: values}, folder / FILE)
    with Checkpoint(folder) as checkpoint:
        return checkpoint.table(EMBEDDING, dtype or values.dtype)


def values_of(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_the_file_are_the_tables_rows(stored, served, tmp_path):
    values = values_of(7, 5, dtype=stored)
    table = stored_table(tmp_path / "model", values, served)
    input_ids = torch.tensor([6, 0, 0, 3])
    assert torch.equal(look_up(table, input_ids), values.to(served)[input_ids])
    assert torch.equal(whole_table(table), values.to(served))
    assert look_up(table, input_ids[:0]).shape == (0, 5)


def test_a_token_outside_the_table_reads_no_other_tensor(tmp_path):
    table = stored_table(tmp_path / "model", values_of(7, 5))
    for token in (-1, 7):
        with pytest.raises(AssertionError):
            table.rows(torch.tensor([0, token]))


def test_a_removed_file_and_one_renamed_over_it_change_nothing(tmp_path):
    values = values_of(7, 5)
    table = stored_table(tmp_path / "model", values)
    save_file({EMBEDDING: values + 1}, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "model" / FILE)
    assert torch.equal(whole_table(table), values)
    (tmp_path / "model" / FILE).unlink()
    assert torch.equal(whole_table(table), values)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data])
def test_a_file_cut_or_overwritten_in_place_is_an_error(change, tmp_path):
    table = stored_table(tmp_path / "model", values_of(7, 5))
    path = tmp_path / "model" / FILE
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(0, 1))
    with pytest.raises(EngineError, match=r"changed while its model is served. Restart the server"):
        table.rows(torch.tensor([1]))


def test_the_file_is_closed_with_its_table(tmp_path):
    table = stored_table(tmp_path / "model", values_of(7, 5))
    descriptor = table._descriptor
    os.fstat(descriptor)
    del table
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_only_large_tables_on_a_disk_stay(tmp_path, monkeypatch):
    stored_table(tmp_path / "model", values_of(7, 5))
    with Checkpoint(tmp_path / "model") as checkpoint:
        info = checkpoint.tensors[EMBEDDING]
        monkeypatch.setattr(embedding, "_is_on_disk", lambda _: True)
        assert not can_stay(info)
        monkeypatch.setattr(embedding, "MIN_STORED_BYTES", info.num_bytes)
        assert can_stay(info)
        monkeypatch.setattr(embedding, "_is_on_disk", lambda _: False)
        assert not can_stay(info)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the kind of file system")
def test_files_that_are_not_on_a_disk_are_known():
    on_no_disk = TensorInfo(Path("/proc/self/status"), 0, 4, "F32", (1, 1))
    assert not embedding._is_on_disk(on_no_disk)
    assert not embedding._is_on_disk(dataclasses.replace(on_no_disk, file=Path("/no such file")))


@pytest.mark.parametrize("name", ["llama", "llama_mha_untied_biases"])
@pytest.mark.parametrize("flags", [{}, {"quantization": "none"}, {"dtype": "float32"}])
def test_a_model_whose_table_stays_gives_the_same_bits(name, flags, tmp_path, request):
    save_model(tmp_path / "model", name, torch.float16)
    held = load(tmp_path / "model", **flags)
    request.getfixturevalue("small_tables_stay")
    left = load(tmp_path / "model", **flags)
    assert isinstance(left.model.embed_tokens, StoredTable)
    prompts = random_prompts()
    for actual, expected in zip(
        run_prompts(left.model, prompts), run_prompts(held.model, prompts), strict=True
    ):
        assert torch.equal(actual, expected)
    assert left.fingerprint == held.fingerprint
    assert left.weights_bytes == held.weights_bytes - held.model.embed_tokens.nbytes


@pytest.mark.usefixtures("small_tables_stay")
def test_the_first_start_and_the_one_from_the_copy_agree(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)
    first, second = load(tmp_path / "model"), load(tmp_path / "model")
    assert isinstance(first.model.embed_tokens, StoredTable)
    assert "cached" in second.notes[0]
    assert torch.equal(
        whole_table(first.model.embed_tokens), whole_table(second.model.embed_tokens)
    )


@pytest.mark.usefixtures("small_tables_stay")
def test_a_4_bit_folder_leaves_its_table(tmp_path):
    save_with_bitsandbytes(tmp_path / "model", "llama", bnb_4bit_quant_type="nf4")
    assert isinstance(load(tmp_path / "model").model.embed_tokens, StoredTable)


@pytest.mark.usefixtures("small_tables_stay")
def test_a_table_that_is_the_head_is_held_unless_the_head_is_quantised(tmp_path):
    save_model(tmp_path / "model", "llama3_tied", torch.bfloat16)
    tied = load(tmp_path / "model")
    assert isinstance(tied.model.embed_tokens, torch.Tensor)
    small = load(tmp_path / "model", lm_head_dtype="int8")
    assert isinstance(small.model.embed_tokens, StoredTable)
    head = small.model.base_linear("lm_head").weight
    change = head.num_bytes - tied.model.embed_tokens.nbytes
    assert small.weights_bytes - tied.weights_bytes == change


def test_adapters_of_the_embedding_read_the_whole_table(tmp_path, request):
    save_model(tmp_path / "model", "llama")
    held = load(tmp_path / "model", quantization="none").model
    request.getfixturevalue("small_tables_stay")
    left = load(tmp_path / "model", quantization="none").model
    generator = torch.Generator().manual_seed(1)
    rows, columns = held.spec.embedding_shape
    a, b = torch.randn(4, rows, generator=generator), torch.randn(columns, 4, generator=generator)
    module = LoraModule(a=a, b=b, magnitude=torch.rand(columns, generator=generator) + 1)
    copy = whole_table(held.embed_tokens).clone()
    for copies in ({EMBEDDING: copy}, {EMBEDDING: copy + 1}, {}):
        magnitude = None if copies else module.magnitude
        weights = LoraWeights(
            modules={"model.embed_tokens": LoraModule(a=a, b=b, magnitude=magnitude)},
            base_copies=copies,
        )
        theirs, ours = (
            pack_adapter(weights, model, torch.float32, pin_memory=False) for model in (held, left)
        )
        assert theirs.entries == ours.entries and torch.equal(theirs.buffer, ours.buffer)


def test_training_reads_the_same_rows(tmp_path, request):
    save_model(tmp_path / "model", "llama")
    held = load(tmp_path / "model", quantization="none").model
    request.getfixturevalue("small_tables_stay")
    left = load(tmp_path / "model", quantization="none").model
    batch = types.SimpleNamespace(input_ids=torch.tensor([5, 6, 5]), lengths=[3])
    for noise in (0.0, 5.0):
        assert torch.equal(embed(left, batch, noise, 1), embed(held, batch, noise, 1))
