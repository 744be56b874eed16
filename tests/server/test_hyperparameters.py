"""Hyperparameters of the API, to the trainer's config and back; the results file."""

import dataclasses

import pytest

from adapters.resolve import check_name
from engine.train.config import TrainConfig
from server.hyperparameters import (
    METHODS,
    allowed_names,
    config_from_json,
    config_to_json,
    shown,
    train_config,
)
from server.job_creation import model_name
from server.results import results_csv


@pytest.mark.parametrize("method", METHODS)
def test_auto_leaves_every_choice_to_the_trainer(method):
    given = dict.fromkeys(allowed_names(method), "auto")
    config, multiplier = train_config(method, given, seed=3)
    assert config == TrainConfig(method=METHODS[method], seed=3)
    assert multiplier is None
    assert shown(config, given)["n_epochs"] == "auto"


def test_every_field_of_the_config_belongs_to_some_method():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    names = {name for method in METHODS for name in allowed_names(method)}
    assert names - {"learning_rate_multiplier", "n_epochs", "eval_interval"} == fields - {
        "method", "seed", "num_epochs",
    }  # fmt: skip


def test_a_config_comes_back_from_the_database():
    config = TrainConfig(target_modules=("q_proj", "v_proj"), learning_rate=1e-3)
    assert config_from_json(config_to_json(config)) == config


def test_what_the_trainer_chose_is_shown():
    given = {"rank": 8, "learning_rate_multiplier": 2, "eval_interval": 7}
    config, multiplier = train_config("reinforcement", given, seed=0)
    assert (config.rank, config.eval_every_steps, multiplier) == (8, 7, 2.0)
    chosen = dataclasses.replace(config, num_epochs=2.5, batch_size=4, learning_rate=4e-5)
    assert shown(chosen, given) == {
        "n_epochs": 3,
        "batch_size": 4,
        "rank": 8,
        "eval_interval": 7,
        "learning_rate_multiplier": 2,
    }
    assert shown(chosen, {"n_epochs": 2.5})["n_epochs"] == 2.5
    whole = dataclasses.replace(chosen, num_epochs=2.0)
    assert repr(shown(whole, {})["n_epochs"]) == "2"
    assert shown(whole, {})["learning_rate_multiplier"] == 1.0
    assert shown(whole, {"learning_rate": 4e-5})["learning_rate_multiplier"] == "auto"


@pytest.mark.parametrize(
    ("base", "suffix", "name"),
    [
        ("demo", None, "ft:demo:herd::12345678"),
        ("demo", "my model!", "ft:demo:herd:my-model-:12345678"),
        ("org/model", "a:b", "ft:org-model:herd:a-b:12345678"),
        ("demo", "größe", "ft:demo:herd:gr--e:12345678"),
        ("b" * 99, "s" * 64, f"ft:{'b' * 24}:herd:{'s' * 64}:12345678"),
    ],
)
def test_names_of_models_are_such_as_adapters_may_have(base, suffix, name):
    assert model_name(base, suffix, "ftjob-0000000012345678") == name
    check_name(f"{name}:ckpt-step-1234567")


def test_results_have_a_line_per_step_and_the_last_word_counts():
    text = results_csv(
        [
            {"step": 2, "total_steps": 3, "train_loss": 9.0, "grad_norm": 1.0},
            {"step": 1, "total_steps": 3, "train_loss": 8.0},
            {"step": 2, "total_steps": 3, "train_loss": 7.0, "valid_loss": 6.0},
        ]
    )
    assert text.decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,grad_norm",
        "1,8.0,,,,",
        "2,7.0,,6.0,,1.0",
    ]
    assert results_csv([]).decode().count("\n") == 1
