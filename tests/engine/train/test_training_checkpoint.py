import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.lora import LoraModule, LoraWeights
from engine.train.checkpoint import (
    DamagedCheckpoint,
    TrainerState,
    finite_metrics,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    publish_final,
    read_state,
    save_checkpoint,
)
from engine.train.config import TrainConfig
from engine.train.resume import check_same_run
from tests.engine.train.training_jobs import ADAPTER_FILE, write_plain

WEIGHTS = LoraWeights(modules={"m": LoraModule(a=torch.ones(2, 3), b=torch.ones(4, 2))})
TENSORS = {"master.layers.0": torch.randn(7, generator=torch.Generator().manual_seed(0))}


def make_state(step=3, **changes):
    fields = {
        "config": TrainConfig(target_modules=("q_proj", r".*\.up_proj"), batch_size=2),
        "base_fingerprint": "base",
        "data_digest": "data",
        "micro_batch_tokens": 128,
        "metrics": (("train_loss", 0.1 + 0.2),),
        "best_value": 1 / 3,
    }
    return TrainerState(**{**fields, "step": step, **changes})


def save(folder, step=3, write=write_plain):
    return save_checkpoint(folder, make_state(step), WEIGHTS, TENSORS, write)


def test_what_is_saved_is_read_again_bit_for_bit(tmp_path):
    state, tensors = load_checkpoint(save(tmp_path))
    assert state == make_state()
    assert torch.equal(tensors["master.layers.0"], TENSORS["master.layers.0"])


def test_a_failed_attempt_leaves_nothing(tmp_path):
    def write(path, weights, config):
        write_plain(path, weights, config)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, write=write)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_own_error_is_told_as_one_of_the_disk(tmp_path):
    def write(path, weights, config):
        write_plain(path, weights, config)
        save_file({"x": torch.zeros(1)}, path / "no" / "such" / "folder")

    with pytest.raises(OSError, match="checkpoint-3"):
        save(tmp_path, write=write)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    path = save(tmp_path)
    (path / "trainer_state.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="KeyError"):
        load_checkpoint(path)
    save(tmp_path)
    assert load_checkpoint(path)[0].step == 3


@pytest.mark.parametrize("name", [ADAPTER_FILE, "trainer_state.safetensors"])
def test_one_wrong_bit_is_found(tmp_path, name):
    path = save(tmp_path)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 4
    (path / name).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{name} is not as it was written"):
        load_checkpoint(path)


def test_another_version_is_not_read(tmp_path):
    path = save(tmp_path)
    text = (path / "trainer_state.json").read_text()
    (path / "trainer_state.json").write_text(text.replace("herd-trainer-1", "herd-trainer-9"))
    with pytest.raises(DamagedCheckpoint, match="herd-trainer-9"):
        load_checkpoint(path)


def test_checkpoints_are_listed_by_number_newest_first(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-100", "checkpoint-20", "checkpoint-9",
    ]  # fmt: skip


def test_the_newest_and_the_best_stay(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    (tmp_path / ".checkpoint-7.unfinished").mkdir()
    prune_checkpoints(tmp_path, keep=2, best_step=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-3", "checkpoint-5", "checkpoint-6"]


def test_the_result_is_an_adapter_without_the_optimizer(tmp_path):
    source = save(tmp_path)
    publish_final(tmp_path, save(tmp_path, 2))
    final = publish_final(tmp_path, source)
    assert sorted(path.name for path in final.iterdir()) == [ADAPTER_FILE, "trainer_state.json"]
    assert read_state(final).step == 3


def test_settings_that_make_another_run_are_named_all_at_once(tmp_path):
    now = make_state(config=TrainConfig(rank=8, batch_size=2, max_steps=9), data_digest="x")
    with pytest.raises(EngineError, match=r"data are others.*rank was 64 and is now 8.*target"):
        check_same_run(make_state(), now, tmp_path)


def test_a_run_may_be_made_longer_and_save_more_often(tmp_path):
    config = dataclasses.replace(make_state().config, max_steps=99, save_every_steps=1)
    check_same_run(make_state(), make_state(config=config), tmp_path)


def test_metrics_that_are_not_finite_are_left_out():
    assert finite_metrics({"a": 1.0, "b": float("nan"), "c": float("inf")}) == (("a", 1.0),)
