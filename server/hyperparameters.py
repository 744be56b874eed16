"""Hyperparameters of the API to and from the trainer's config.

OpenAI's three (n_epochs, batch_size, learning_rate_multiplier), beta of dpo, eval_interval of
reinforcement, and besides them every field of engine/train/config.TrainConfig that the method
uses, under its own name. "auto" is the same as leaving one out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engine.train.config import MAX_NUMBER, Method, TrainConfig
from server.errors import ApiError, bad_request

AUTO = "auto"
MULTIPLIER = "learning_rate_multiplier"
METHODS: dict[str, Method] = {
    "supervised": "supervised", "reward": "reward", "dpo": "dpo", "reinforcement": "grpo",
}  # fmt: skip
"""The API's name of a method and the trainer's."""
OPENAI_NAMES = {"n_epochs": "num_epochs", "eval_interval": "eval_every_steps"}
ELSEWHERE = {
    "seed": "it is a parameter of the job itself",
    "method": "it is a parameter of the job itself",
    "num_epochs": "it is called n_epochs here",
    "reasoning_effort": "these models do not reason apart from their answer",
    "compute_multiplier": "set num_generations, the answers drawn for each prompt",
    "eval_samples": "the whole validation file is used",
}
"""Names that a user may look for, and what to do instead."""
OF_ONE_METHOD: dict[str, Method] = {
    "beta": "dpo",
    "num_generations": "grpo",
    "max_completion_tokens": "grpo",
    "temperature": "grpo",
    "kl_coefficient": "grpo",
    "clip_epsilon": "grpo",
}


def train_config(
    method: str, hyperparameters: Mapping[str, Any], *, seed: int
) -> tuple[TrainConfig, float | None]:
    """What the trainer is told, and the learning rate's multiplier where one was given.

    Args:
        method: the API's name.

    Raises:
        ApiError: 400, an unknown name or a value that is not allowed.
    """
    path = f"method.{method}.hyperparameters"
    hints = typing.get_type_hints(TrainConfig)
    chosen: dict[str, Any] = {"method": METHODS[method], "seed": seed}
    multiplier = None
    for name, value in hyperparameters.items():
        param = f"{path}.{name[:80]}"
        if name not in allowed_names(method):
            raise _unknown(name, method, param)
        if value == AUTO or value is None:
            continue
        if name == MULTIPLIER:
            multiplier = _checked(float, value, param)
            if not 0 < multiplier < MAX_NUMBER:
                text = f"{param}: expected more than 0 and less than {MAX_NUMBER}, got {multiplier}"
                raise bad_request(text, param)
        else:
            field = OPENAI_NAMES.get(name, name)
            chosen[field] = _checked(hints[field], value, param)
    if multiplier is not None and "learning_rate" in chosen:
        raise bad_request(
            f"{path}.{MULTIPLIER}: cannot be combined with learning_rate; give one of them",
            f"{path}.{MULTIPLIER}",
        )
    try:
        return TrainConfig(**chosen), multiplier
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        param = f"{path}.{_api_name(name)}"
        raise bad_request(f"{param}:{problem}", param) from error


def allowed_names(method: str) -> list[str]:
    """The hyperparameters of a method."""
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    return [
        MULTIPLIER,
        *(
            _api_name(name)
            for name in fields
            if name not in ("method", "seed")
            and OF_ONE_METHOD.get(name, METHODS[method]) == METHODS[method]
        ),
        *(["eval_interval"] if method == "reinforcement" else []),
    ]


def shown(config: TrainConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as a job shows them: OpenAI's always, others where they were given.

    Args:
        config: as far as it is known: a field that is None is "auto".
        given: by the user.
    """
    known = dataclasses.asdict(config)
    given = {name: value for name, value in given.items() if value not in (AUTO, None)}
    names = dict.fromkeys(("n_epochs", "batch_size", *(["beta"] if config.method == "dpo" else [])))
    values = {
        name: known[OPENAI_NAMES.get(name, name)] for name in (*names, *given) if name != MULTIPLIER
    }
    epochs = values["n_epochs"]
    if epochs is not None and (epochs == int(epochs) or "n_epochs" not in given):
        values["n_epochs"] = math.ceil(epochs)  # an integer, which OpenAI's clients expect
    is_default = config.learning_rate is not None and "learning_rate" not in given
    values[MULTIPLIER] = given.get(MULTIPLIER, 1.0 if is_default else None)
    return {name: AUTO if value is None else value for name, value in values.items()}


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_json(stored: Mapping[str, Any]) -> TrainConfig:
    """What config_to_json gave, back from the database."""
    return TrainConfig(**{**stored, "target_modules": tuple(stored["target_modules"])})


def _api_name(field: str) -> str:
    return "n_epochs" if field == "num_epochs" else field


def _checked(kind: Any, value: Any, param: str) -> Any:
    """A value of the config field's type, as strictly as other parameters are read."""
    try:
        # JSON has no tuples: in JSON mode a list is one.
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]["msg"]
        raise bad_request(f"{param}: {problem}, got {value!r}"[:300], param) from None


def _unknown(name: str, method: str, param: str) -> ApiError:
    if name in ELSEWHERE:
        text = f"{param}: not a hyperparameter here: {ELSEWHERE[name]}"
    elif name in OF_ONE_METHOD:
        owner = next(key for key, value in METHODS.items() if value == OF_ONE_METHOD[name])
        text = f"{param}: only the method {owner!r} has it, this job's is {method!r}"
    else:
        names = ", ".join(sorted(allowed_names(method)))
        text = f"Unknown parameter: '{param}'. There are: {names}"
    return bad_request(text, param, "unknown_parameter")
