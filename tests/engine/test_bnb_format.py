"""Broken and foreign quantised checkpoints are refused by name."""

import json
import shutil

import pytest
import torch

from engine.errors import CheckpointError
from tests.engine.tiny_models import FILE, WEIGHT, load, rewrite, save_model, save_with_bitsandbytes


def edit_state(tensors, **changes):
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].numpy().tobytes())
    state.update(changes)
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


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
    "shape is no list": (lambda ts: edit_state(ts, shape=7), r"shape: .*, found 7"),
    "dtype is no name": (lambda ts: edit_state(ts, dtype=[1]), r"dtype: expected one of .*\[1\]"),
    "block size is a fraction": (lambda ts: edit_state(ts, blocksize=64.0), "blocksize: .*64.0"),
    "no nested absmax": (
        lambda ts: ts.pop(f"{WEIGHT}.nested_absmax"),
        "nested_absmax is missing",
    ),
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
        "quant_map: expected the standard table of nf4",
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


def test_scales_that_are_no_numbers_are_refused(four_bit, tmp_path):
    shutil.copytree(four_bit, tmp_path / "model")

    def change(tensors):
        tensors[f"{WEIGHT}.nested_absmax"][0] = float("inf")

    rewrite(tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=f"tensor {WEIGHT}: its scales hold NaN or infinity"):
        load(tmp_path / "model")


def test_leftover_settings_of_a_dequantised_copy_are_no_quantisation(tmp_path):
    save_model(tmp_path / "model", "llama")
    path = tmp_path / "model" / "config.json"
    left = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": left}))
    assert load(tmp_path / "model").quantization == "nf4"
