"""Files that are missing, cut or malformed."""

import json
import shutil

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError
from tests.engine.tiny_models import FILE, load, rewrite, save_model


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
