"""Names in checkpoints, and mismatches listed all at once."""

import pytest
import torch
import transformers

from engine.bnb_format import StoredWeight
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from engine.model_config import ModelSpec
from engine.tensor_plan import plan_tensors
from tests.engine.tiny_models import (
    FILE,
    load,
    oracle_logits,
    random_prompts,
    rewrite,
    run_prompts,
    save_model,
    save_with_bitsandbytes,
)


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


def test_plans_read_in_the_order_of_the_disk(tmp_path):
    folder = tmp_path / "model"
    save_with_bitsandbytes(folder, "llama", bnb_4bit_quant_type="nf4")
    with Checkpoint(folder) as checkpoint:
        sources = plan_tensors(checkpoint, ModelSpec.from_folder(folder)).sources.values()
        names = [s.packed_name if isinstance(s, StoredWeight) else s for s in sources]
        offsets = [checkpoint.tensors[name].offset for name in names]
    assert offsets == sorted(offsets)
