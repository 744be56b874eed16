import dataclasses

import pytest
import torch

from engine.errors import RequestError
from engine.model_config import ModelSpec
from engine.train import defaults
from engine.train.config import TrainConfig
from engine.train.defaults import num_parameters, resolve
from tests.engine.tiny_models import make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spec")
    make_model("llama").config.save_pretrained(folder)
    return ModelSpec.from_folder(folder)


def resolved(spec, num_samples=1000, max_model_len=128, device=CPU, **settings):
    return resolve(
        TrainConfig(**settings),
        spec,
        num_samples=num_samples,
        max_model_len=max_model_len,
        device=device,
    )


def test_defaults_are_the_papers(spec):
    config = resolved(spec, num_samples=9846)
    assert (config.rank, config.alpha, config.dropout) == (64, 16.0, 0.1)
    assert (config.learning_rate, config.batch_size, config.max_grad_norm) == (2e-4, 16, 0.3)
    assert (config.lr_schedule, config.beta2, config.optimizer) == ("constant", 0.999, "adamw")
    assert (config.num_epochs, config.max_steps) == (1.0, 616)


def test_a_large_model_gets_the_papers_rate_and_dropout_for_33b_and_65b(spec, monkeypatch):
    monkeypatch.setattr(defaults, "num_parameters", lambda _spec: 32_500_000_000)
    config = resolved(spec)
    assert (config.learning_rate, config.dropout) == (1e-4, 0.05)


def test_policies_learn_at_a_tenth_of_the_rate(spec):
    for method in ("dpo", "grpo"):
        assert resolved(spec, method=method).learning_rate == pytest.approx(2e-5)


def test_a_run_has_an_end(spec):
    with pytest.raises(RequestError, match="num_epochs is 1e"):
        resolved(spec, num_samples=16000, num_epochs=1e9)
    for name, value in {"learning_rate": float("inf"), "max_steps": 2**31}.items():
        with pytest.raises(ValueError, match=f"{name}: expected less than"):
            TrainConfig(**{name: value})


def test_a_policy_drops_nothing_for_its_reference_does_not(spec):
    for method in ("dpo", "grpo"):
        assert resolved(spec, method=method).dropout == 0.0
        assert resolved(spec, method=method, dropout=0.1).dropout == 0.1


def test_nothing_is_left_open_but_patience(spec):
    config = resolved(spec)
    open_fields = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None]
    assert open_fields == ["early_stopping_patience"]


def test_what_the_user_set_stays(spec):
    settings = {"dropout": 0.0, "learning_rate": 1.0, "batch_size": 3, "max_seq_len": 40,
                "micro_batch_tokens": 7, "paged": True, "eval_every_steps": 5,
                "save_every_steps": 6}  # fmt: skip
    config = resolved(spec, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(("num_samples", "batch_size", "num_epochs"), [
    (1, 1, 10), (10, 1, 10), (40, 4, 10), (120, 8, 7), (200, 16, 8), (1600, 16, 1),
])  # fmt: skip
def test_few_data_make_smaller_batches_and_more_epochs(spec, num_samples, batch_size, num_epochs):
    config = resolved(spec, num_samples=num_samples)
    assert (config.batch_size, config.num_epochs) == (batch_size, num_epochs)


def test_max_steps_is_whatever_num_epochs_says(spec):
    config = resolved(spec, num_samples=160, max_steps=5, num_epochs=3.0)
    assert (config.max_steps, config.num_epochs) == (5, 0.5)


def test_part_of_an_epoch_can_be_asked_for(spec):
    assert resolved(spec, num_samples=160, num_epochs=0.25).max_steps == 3


def test_ten_evaluations_and_checkpoints_in_a_run(spec):
    config = resolved(spec, max_steps=95)
    assert (config.eval_every_steps, config.save_every_steps) == (10, 10)


def test_short_memory_makes_a_smaller_micro_batch(spec, monkeypatch):
    assert resolved(spec).micro_batch_tokens == 512
    monkeypatch.setattr(defaults, "available_device_bytes", lambda _device: 5_000_000)
    assert 64 < resolved(spec).micro_batch_tokens < 512
    monkeypatch.setattr(defaults, "available_device_bytes", lambda _device: 0)
    assert resolved(spec).micro_batch_tokens == 64


def test_state_is_paged_on_a_gpu_only(spec, monkeypatch):
    monkeypatch.setattr(defaults, "available_device_bytes", lambda _device: None)
    assert resolved(spec).paged is False
    assert resolved(spec, device=torch.device("cuda")).paged is True


def test_more_tokens_than_the_model_holds_are_refused(spec):
    with pytest.raises(RequestError, match="max_seq_len is 129, but the model holds 128"):
        resolved(spec, max_seq_len=129)


def test_parameters_are_those_of_the_base(spec):
    assert num_parameters(spec) == sum(p.numel() for p in make_model("llama").parameters())
