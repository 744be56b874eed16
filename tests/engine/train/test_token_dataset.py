import pytest
import torch

from engine.errors import EngineError
from engine.train.token_dataset import load_dataset, make_dataset, save_dataset


def test_what_is_saved_is_read_again(tmp_path):
    sequences = [([1, 5, 2], [0.0, 1.0, 1.0]), ([7], [0.5])]
    save_dataset(tmp_path / "data", make_dataset("supervised", sequences))
    dataset = load_dataset(tmp_path / "data")
    assert dataset.kind == "supervised"
    assert dataset.num_samples == 2
    for index, (ids, weights) in enumerate(sequences):
        read_ids, read_weights = dataset.sequence(index)
        assert read_ids.tolist() == ids
        assert read_weights.tolist() == weights


def test_a_preference_sample_is_two_sequences():
    dataset = make_dataset("preference", [([1, 2], [0.0, 1.0])] * 6)
    assert dataset.num_samples == 3


def test_a_damaged_or_missing_file_is_an_error_that_names_it(tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"x" * 100)
    for path in (damaged, tmp_path / "missing"):
        with pytest.raises(EngineError, match=path.name):
            load_dataset(path)


def test_another_format_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(EngineError, match="herd-tokens-1"):
        load_dataset(tmp_path / "other")
