"""What is refused when a job is created: everything that can be known before its data are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.registry import AdapterRecord
from engine.api import EngineInfo
from engine.errors import RequestError
from engine.train.config import TrainConfig
from server.errors import ApiError, bad_request
from server.files import Files

if TYPE_CHECKING:
    from engine.model_config import ModelSpec

PURPOSE = "fine-tune"
SCORE_HEAD = "score"


async def check_file(files: Files, file_id: str | None, param: str) -> None:
    """Raises:
    ApiError: there is no such file, or it was uploaded for something else.
    """
    if file_id is None:
        return
    try:
        file = await files.get(file_id, param)
    except ApiError as error:
        raise bad_request(error.message, param, error.code) from None  # a 404 is the URL's fault
    if file.purpose != PURPOSE:
        text = f"{param}: {file.id} has purpose {file.purpose!r}, expected {PURPOSE!r}"
        raise bad_request(text, param)


def fit_config(
    config: TrainConfig,
    given: Mapping[str, Any],
    *,
    path: str,
    start: AdapterRecord | None,
    spec: ModelSpec,
    info: EngineInfo,
    max_lora_rank: int | None,
    has_validation: bool,
) -> TrainConfig:
    """The config with what the start adapter and the server decide.

    Args:
        given: hyperparameters that the user gave.
        path: where they stand in the body.
        start: the adapter that training starts from.
        has_validation: a validation file is given.

    Raises:
        ApiError: they contradict each other.
    """
    if config.max_seq_len is not None and config.max_seq_len > info.max_model_len:
        text = f"{path}.max_seq_len: the model holds {info.max_model_len}, got {config.max_seq_len}"
        raise bad_request(text, f"{path}.max_seq_len")
    if config.early_stopping_patience is not None and not has_validation:
        text = f"{path}.early_stopping_patience: needs a validation_file, whose loss it watches"
        raise bad_request(text, f"{path}.early_stopping_patience")
    if start is not None:
        config = _continue(config, given, path, start)
    elif config.target_modules:
        _check_targets(config, path, spec)
    if max_lora_rank is not None and config.rank > max_lora_rank:
        if "rank" in given or start is not None:
            text = f"{path}.rank: the server takes up to {max_lora_rank}, got {config.rank}"
            raise bad_request(f"{text} (--max-lora-rank)", f"{path}.rank")
        config = dataclasses.replace(config, rank=max_lora_rank)
    return config


def _check_targets(config: TrainConfig, path: str, spec: ModelSpec) -> None:
    from engine.train.targets import target_paths

    try:
        target_paths(spec, config.target_modules)
    except RequestError as error:
        raise bad_request(f"{path}.{error}", f"{path}.target_modules") from error


def check_reward_model(record: AdapterRecord | None, name: str, param: str) -> AdapterRecord:
    """Raises:
    ApiError: it is no reward adapter.
    """
    if record is None or not record.info.has_score_head:
        text = f"{param}: '{name}' is no reward adapter. Train one with the method 'reward'"
        raise bad_request(text, param)
    return record


def _continue(
    config: TrainConfig, given: Mapping[str, Any], path: str, start: AdapterRecord
) -> TrainConfig:
    """An adapter is trained on as it is: with its rank, on its layers."""
    is_reward = config.method == "reward"
    if start.info.has_score_head and not is_reward:
        text = f"model: '{start.name}' is a reward adapter, which only the method 'reward' trains"
        raise bad_request(text, "model")
    own: dict[str, Any] = {
        "rank": start.info.rank,
        "alpha": start.info.alpha,
        "target_modules": tuple(name for name in start.info.targets if name != SCORE_HEAD),
    }
    for name, value in own.items():
        asked = getattr(config, name)
        if name in given and given[name] not in ("auto", None) and asked != value:
            raise bad_request(
                f"{path}.{name}: training starts from '{start.name}', whose {name} is {value!r}. "
                f"Leave it out, or start from the base",
                f"{path}.{name}",
            )
    return dataclasses.replace(config, **own)
