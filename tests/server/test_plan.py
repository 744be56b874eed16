"""serve.py plan: what it prints, and that it loads nothing."""

from __future__ import annotations

import json

import pytest

from engine.errors import CheckpointError
from server.plan import parse_memory, plan, read_shapes


def test_an_alias_needs_no_folder(capsys):
    assert plan(["--base", "llama-65b", "--train", "--gpu-memory", "48GiB"]) == 0
    text = capsys.readouterr().out
    assert "65b: LlamaForCausalLM, nf4, float16" in text
    serving, alone, both = text.split("\n\n")[1:]
    assert "weights                34.46 GB" in serving and "KV cache for" in serving
    assert "48.0 GiB  fits" in alone
    assert "Both at once: --training-memory-bytes" in both and "does not fit" in both


def test_a_gpu_that_does_not_suffice_is_the_exit_status(capsys):
    assert plan(["--base", "llama-65b", "--gpu-memory", "24GiB"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert plan(["--base", "llama-33b", "--train", "--gpu-memory", "16GB"]) == 1
    assert plan(["--base", "llama-33b", "--train", "--gpu-memory", "24GiB"]) == 0


def test_the_usual_sizes_are_shown_when_none_is_given(capsys):
    plan(["--base", "demo"])
    text = capsys.readouterr().out
    assert [size for size in ("16.0", "24.0", "48.0", "80.0", "141.0") if f"{size} GiB" in text]
    assert text.count("KV cache for") == 5


def test_flags_of_the_server_change_the_plan(capsys):
    def cache_tokens(*flags: str) -> int:
        plan(["--base", "llama-7b", "--gpu-memory", "24GiB", *flags])
        return int(
            capsys.readouterr().out.rpartition("KV cache for ")[2].split()[0].replace(",", "")
        )

    usual = cache_tokens()
    assert cache_tokens("--max-loras", "1") > usual
    assert cache_tokens("--max-lora-rank", "64") < usual
    assert cache_tokens("--enforce-eager") > usual
    assert cache_tokens("--quantization", "none") < usual
    assert cache_tokens("--gpu-memory-utilization", "0.95") > usual


def test_the_cache_is_no_larger_than_all_sequences_need(capsys):
    plan(["--base", "llama-7b", "--gpu-memory", "80GiB", "--max-num-seqs", "4"])
    assert "KV cache for 8,192 tokens, 4 sequences" in capsys.readouterr().out


def test_any_folder_with_a_config_is_planned(tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 112,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert read_shapes("mine", str(tmp_path)).hidden_size == 64
    assert read_shapes(str(folder), None).num_layers == 2


def test_what_cannot_be_found_is_said():
    with pytest.raises(CheckpointError, match=r"no config.json in nowhere/at-all.*llama-7b"):
        read_shapes("nowhere/at-all", None)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * 2**30), ("16GB", 16 * 10**9), ("80", 80 * 2**30), ("14.75 gib", 15837691904)],
)
def test_sizes_of_memory(text, num_bytes):
    assert parse_memory(text) == num_bytes


def test_a_size_that_is_none():
    with pytest.raises(ValueError, match="--gpu-memory: expected a size"):
        parse_memory("lots")
