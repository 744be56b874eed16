"""Loading: bitsandbytes' checkpoints as transformers writes them, the cache, and every refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine import memory, weights
from engine.bnb_format import StoredWeight
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError, NotEnoughMemory
from engine.model_config import ModelSpec
from engine.tensor_plan import plan_tensors
from tests.engine.tiny_models import (
    dense_oracle,
    load,
    oracle_logits,
    random_prompts,
    run_prompts,
    save_model,
)

FILE = "model.safetensors"


def save_with_bitsandbytes(
    folder: Path, name: str, dtype=torch.bfloat16, *, max_shard_size="5GB", **options
):
    """A 4-bit checkpoint written by transformers and bitsandbytes themselves."""
    source = folder.with_name(folder.name + "-16bit")
    save_model(source, name, dtype)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=dtype
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return source


def assert_equals_oracle(model, oracle, dtype=torch.bfloat16):
    """Within twice the rounding noise that transformers' own run in that type has."""
    prompts = random_prompts()
    theirs = oracle_logits(oracle.to(dtype), prompts)
    exact = oracle_logits(oracle.float(), prompts)
    for actual, other, reference in zip(run_prompts(model, prompts), theirs, exact, strict=True):
        noise = (other - reference).abs().max().item()
        assert (actual - reference).abs().max().item() <= max(2 * noise, 1e-4)


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


# --- 16-bit folders -----------------------------------------------------------------------------


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


# --- names ----------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    save_file(change(tensors) or tensors, folder / FILE)


def test_names_without_the_model_prefix_load(tmp_path):
    save_model(tmp_path / "model", "qwen2")
    expected = load(tmp_path / "model", quantization="none").fingerprint
    rewrite(tmp_path / "model", lambda ts: {n.removeprefix("model."): t for n, t in ts.items()})
    assert load(tmp_path / "model", quantization="none").fingerprint == expected


def test_stored_rotary_frequencies_are_ignored(tmp_path):
    save_model(tmp_path / "model", "llama")
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "model", lambda ts: {**ts, key: torch.zeros(8)})
    load(tmp_path / "model", quantization="none")


def test_a_stored_tied_head_counts_only_when_it_differs(tmp_path):
    oracle = save_model(tmp_path / "model", "qwen2")
    head = oracle.lm_head.weight.detach()
    rewrite(tmp_path / "model", lambda ts: {**ts, "lm_head.weight": head.clone()})
    assert load(tmp_path / "model", quantization="none").spec.tie_word_embeddings
    rewrite(tmp_path / "model", lambda ts: {**ts, "lm_head.weight": head + 0.5})
    loaded = load(tmp_path / "model", quantization="none")
    assert not loaded.spec.tie_word_embeddings
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompts = random_prompts()
    actual, expected = run_prompts(loaded.model, prompts), oracle_logits(theirs, prompts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    # The 4-bit copy keeps both.
    assert load(tmp_path / "model").fingerprint == load(tmp_path / "model").fingerprint


def test_a_tied_embedding_stored_as_head_loads(tmp_path):
    save_model(tmp_path / "model", "qwen2")
    expected = load(tmp_path / "model", quantization="none").fingerprint
    rewrite(
        tmp_path / "model",
        lambda ts: {n.replace("model.embed_tokens", "lm_head"): t for n, t in ts.items()},
    )
    assert load(tmp_path / "model", quantization="none").fingerprint == expected


def test_every_mismatch_is_listed_at_once(tmp_path):
    save_model(tmp_path / "model", "llama")

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)

    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "model", quantization="none")
    message = str(caught.value)
    assert (
        "tensor model.layers.1.mlp.up_proj.weight [112, 64] is missing: no file has it" in message
    )
    assert "tensor model.layers.7.mlp.up_proj.weight [2, 2] is unexpected" in message
    assert "tensor model.norm.weight: expected [64] of F32, F16, BF16, found [65] of F32" in message
    assert (
        "tensor lm_head.weight: expected [97, 64] of F32, F16, BF16, found [97, 64] of I32"
        in message
    )
    assert str(tmp_path / "model") in message and FILE in message and "Download" in message


def test_a_long_list_of_mismatches_is_cut(tmp_path):
    save_model(tmp_path / "model", "llama")
    rewrite(tmp_path / "model", lambda _: {"model.nothing": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d+ more"):
        load(tmp_path / "model", quantization="none")


# --- broken 4-bit state -----------------------------------------------------------------------


def edit_state(tensors, **changes):
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].numpy().tobytes())
    state.update(changes)
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


WEIGHT = "model.layers.0.mlp.up_proj.weight"
BROKEN = {
    "two quant states": (
        lambda ts: ts.update(
            {f"{WEIGHT}.quant_state.bitsandbytes__fp4": torch.zeros(3, dtype=torch.uint8)}
        ),
        "expected exactly one quant_state, found",
    ),
    "no quant state": (
        lambda ts: ts.pop(f"{WEIGHT}.quant_state.bitsandbytes__nf4"),
        "expected exactly one quant_state, found none",
    ),
    "no codes": (
        lambda ts: ts.pop(WEIGHT),
        f"tensor {WEIGHT} is missing, though {WEIGHT}.* is there",
    ),
    "state is no JSON": (
        lambda ts: ts.update(
            {f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}
        ),
        "expected a small JSON object in bytes",
    ),
    "unknown type": (
        lambda ts: edit_state(ts, quant_type="int4"),
        'quant_type: expected nf4 or fp4.*"int4"',
    ),
    "odd block size": (
        lambda ts: edit_state(ts, blocksize=48),
        "blocksize: expected one of 32, 64",
    ),
    "odd dtype": (lambda ts: edit_state(ts, dtype="float64"), "dtype: expected one of float32"),
    "wrong shape": (lambda ts: edit_state(ts, shape=[64, 112]), r"shape: expected \[112, 64\]"),
    "nested block size": (
        lambda ts: edit_state(ts, nested_blocksize=128),
        "nested_blocksize: expected 256",
    ),
    "no offset": (
        lambda ts: edit_state(ts, nested_offset=None),
        "nested_offset: expected a number",
    ),
    "short codes": (
        lambda ts: ts.update({WEIGHT: ts[WEIGHT][:-1]}),
        "expected 3584 bytes of packed codes, found 3583",
    ),
    "short absmax": (
        lambda ts: ts.update({f"{WEIGHT}.absmax": ts[f"{WEIGHT}.absmax"][:-1]}),
        r"absmax: expected U8 \[112\], found U8 \[111\]",
    ),
    "no nested map": (
        lambda ts: ts.pop(f"{WEIGHT}.nested_quant_map"),
        "nested_quant_map is missing",
    ),
    "another table": (
        lambda ts: ts.update({f"{WEIGHT}.quant_map": ts[f"{WEIGHT}.quant_map"].flip(0)}),
        "quant_map: expected the standard nf4 table",
    ),
    "another nested table": (
        lambda ts: ts.update(
            {f"{WEIGHT}.nested_quant_map": ts[f"{WEIGHT}.nested_quant_map"] * 1.01}
        ),
        "nested_quant_map: expected the standard",
    ),
}


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_bit") / "model"
    save_with_bitsandbytes(
        folder, "llama", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_refuses_broken_quant_states(name, four_bit, tmp_path):
    shutil.copytree(four_bit, tmp_path / "model")
    change, problem = BROKEN[name]

    def apply(tensors):
        change(tensors)

    rewrite(tmp_path / "model", apply)
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(tmp_path / "model")
    assert WEIGHT in str(caught.value) and FILE in str(caught.value)


def test_an_announced_4_bit_checkpoint_without_4_bit_weights_is_refused(four_bit, tmp_path):
    save_model(tmp_path / "model", "llama")
    shutil.copyfile(four_bit / "config.json", tmp_path / "model" / "config.json")
    with pytest.raises(CheckpointError, match="announces 4-bit weights"):
        load(tmp_path / "model")


def test_4_bit_types_are_not_converted(four_bit):
    with pytest.raises(CheckpointError, match=r"--quantization fp4 was asked for, .* is nf4"):
        load(four_bit, quantization="fp4")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method gptq"),
        ({"quant_method": "awq"}, "quant_method awq"),
        ({"load_in_8bit": True}, "bitsandbytes with load_in_8bit"),
        ({"bits": 4}, "quant_method None"),
        ("nf4", "expected an object"),
    ],
)
def test_other_quantisations_are_refused_by_name(settings, found, tmp_path):
    save_model(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(CheckpointError, match=found) as caught:
        load(tmp_path / "model")
    assert "config.json" in str(caught.value) and "16-bit original" in str(caught.value)


# --- files ------------------------------------------------------------------------------------


def test_missing_weights_are_refused(tmp_path):
    save_model(tmp_path / "model", "llama")
    (tmp_path / "model" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"found neither model.safetensors nor"):
        load(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        CheckpointError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"
    ):
        load(tmp_path / "model")
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (lambda data: data[:-1], "truncated: its header needs"),
        (lambda data: data[:50], "truncated: its header needs"),
        (lambda _: b"abc", "no valid safetensors file: the header length"),
        (lambda _: (1 << 60).to_bytes(8, "little") + b"{}", "the header length"),
        (lambda _: (2).to_bytes(8, "little") + b"[]", "the header is no object"),
        (lambda _: (2).to_bytes(8, "little") + b"{]", "the header is not JSON"),
        (lambda _: with_header({"a": {"dtype": "F32"}}), "entry of tensor a is incomplete"),
        (lambda _: with_header({"a": 3}), "entry of tensor a is incomplete"),
        (
            lambda _: with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
            "entry of tensor a is ",
        ),
        (
            lambda _: with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
            r"tensor a takes 4 bytes, its shape \[2\] 8",
        ),
    ],
)
def test_broken_files_are_refused(content, problem, tmp_path):
    save_model(tmp_path / "model", "llama")
    path = tmp_path / "model" / FILE
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(tmp_path / "model")
    assert str(path) in str(caught.value)


def with_header(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


def test_a_file_cut_after_the_check_is_an_error_too(tmp_path):
    save_model(tmp_path / "model", "llama")
    path = tmp_path / "model" / FILE
    with Checkpoint(tmp_path / "model") as checkpoint:
        last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].offset)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="the file ends before the tensor does"):
            checkpoint.read(last)


def test_tensors_of_unknown_types_are_refused(tmp_path):
    save_model(tmp_path / "model", "llama")
    rewrite(
        tmp_path / "model",
        lambda ts: {**ts, "model.norm.weight": ts["model.norm.weight"].to(torch.float8_e4m3fn)},
    )
    with pytest.raises(CheckpointError, match=r"found .* of F8_E4M3"):
        load(tmp_path / "model", quantization="none")
    with (
        Checkpoint(tmp_path / "model") as checkpoint,
        pytest.raises(CheckpointError, match="has type F8_E4M3; supported are"),
    ):
        checkpoint.read("model.norm.weight")


def test_broken_indexes_are_refused(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    shutil.rmtree(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    index_path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    load(tmp_path / "model", quantization="none")

    (tmp_path / "model" / files[1]).rename(tmp_path / "aside")
    with pytest.raises(
        CheckpointError, match=rf"1 of {len(files)} weight files are missing: {files[1]}"
    ):
        load(tmp_path / "model", quantization="none")
    (tmp_path / "aside").rename(tmp_path / "model" / files[1])

    for wrong, problem in (
        ({"model.norm.weight": "../elsewhere.safetensors"}, "expected a file name"),
        ({"model.norm.weight": 3}, "expected a file name, found 3"),
        (
            {"model.norm.weight": files[0], "x": files[0]},
            "tensor .* is missing, though .* in this file",
        ),
    ):
        index_path.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match=problem):
            load(tmp_path / "model", quantization="none")
    index_path.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        load(tmp_path / "model", quantization="none")


def test_nan_in_a_weight_is_named_when_quantising(tmp_path):
    save_model(tmp_path / "model", "llama", torch.bfloat16)

    def change(tensors):
        tensors[WEIGHT][3, 3] = float("nan")

    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=f"tensor {WEIGHT} cannot be quantised: .*NaN"):
        load(tmp_path / "model")
    assert not list((tmp_path / "cache").iterdir())


# --- memory -----------------------------------------------------------------------------------


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


def fake_system(monkeypatch, root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(memory, "PROC_ROOT", root / "proc")
    monkeypatch.setattr(memory, "CGROUP_ROOT", root / "cgroup")


def test_control_groups_limit_what_is_available(tmp_path, monkeypatch):
    meminfo = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"}
    fake_system(monkeypatch, tmp_path / "plain", meminfo)
    assert memory.available_host_bytes() == 800 * 1024
    second = {
        **meminfo,
        "proc/self/cgroup": "0::/outer/inner\n",
        "cgroup/outer/inner/memory.max": "max\n",
        "cgroup/outer/inner/memory.current": "5\n",
        "cgroup/outer/memory.max": "5000\n",
        "cgroup/outer/memory.current": "4000\n",
        "cgroup/outer/memory.stat": "anon 1\ninactive_file 300\n",
    }
    fake_system(monkeypatch, tmp_path / "v2", second)
    assert memory.available_host_bytes() == 1300
    first = {
        **meminfo,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/in/a/container\n",
        "cgroup/memory/memory.limit_in_bytes": "7000\n",
        "cgroup/memory/memory.usage_in_bytes": "6900\n",
    }
    fake_system(monkeypatch, tmp_path / "v1", first)
    assert memory.available_host_bytes() == 100
    fake_system(monkeypatch, tmp_path / "none", {})
    assert memory.available_host_bytes() is None


def test_plans_read_in_the_order_of_the_disk(four_bit):
    with Checkpoint(four_bit) as checkpoint:
        sources = plan_tensors(checkpoint, ModelSpec.from_folder(four_bit)).sources.values()
        names = [s.packed_name if isinstance(s, StoredWeight) else s for s in sources]
        offsets = [checkpoint.tensors[name].offset for name in names]
    assert offsets == sorted(offsets)
