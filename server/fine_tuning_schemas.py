"""Bodies of /v1/fine_tuning/jobs: OpenAI's, and a method `reward` besides theirs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from server.message_schemas import Body, Text, unsupported

FileId = Annotated[str, Field(min_length=1, max_length=80)]
Hyperparameters = dict[str, Any]
"""Checked in server/hyperparameters.py, which knows what a method takes."""


def _only_pairs(metadata: dict[str, str] | None) -> dict[str, str] | None:
    for key in metadata or {}:
        if len(key) > 64:
            raise ValueError(f"keys have at most 64 characters, {key[:80]!r} has {len(key)}")
    return metadata


Metadata = Annotated[
    dict[Text, Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
    AfterValidator(_only_pairs),
]


class SupervisedMethod(Body):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(Body):
    hyperparameters: Hyperparameters | None = None


class RewardMethod(Body):
    hyperparameters: Hyperparameters | None = None


class Grader(Body):
    """Who scores the answers: a reward adapter of this server."""

    type: str
    name: Text | None = None
    """OpenAI's clients send one; it is shown again and means nothing."""
    model: str | None = None
    input: Annotated[
        Any, unsupported("a reward adapter reads the conversation itself; leave input out")
    ] = None
    range: Annotated[Any, unsupported("rewards are used as they are; leave range out")] = None
    sampling_params: Annotated[
        Any, unsupported("a reward adapter does not sample; leave sampling_params out")
    ] = None

    @model_validator(mode="after")
    def _is_a_reward_adapter(self) -> Self:
        if self.type != "score_model":
            raise ValueError(
                f"type: expected 'score_model', got {self.type[:80]!r}: answers are scored by a "
                f"reward adapter, which 'model' names"
            )
        if self.model is None:
            raise ValueError("model: the name of a reward adapter is missing")
        return self


class ReinforcementMethod(Body):
    grader: Grader
    response_format: Annotated[Any, unsupported("answers are drawn without a grammar")] = None
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    type: Literal["supervised", "dpo", "reinforcement", "reward"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: ReinforcementMethod | None = None
    reward: RewardMethod | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        for name in ("supervised", "dpo", "reinforcement", "reward"):
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"{name}: only allowed where type is {name!r}")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("reinforcement: a grader is needed, which scores the answers")
        return self

    def hyperparameters(self) -> Hyperparameters:
        chosen = getattr(self, self.type)
        return (chosen.hyperparameters or {}) if chosen is not None else {}


class Wandb(Body):
    project: Annotated[Text, Field(min_length=1)]
    name: Text | None = None
    entity: Text | None = None
    tags: list[Text] | None = None


class Integration(Body):
    type: Literal["wandb"]
    wandb: Wandb


class CreateJobRequest(Body):
    model: str
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The old place of method.supervised.hyperparameters."""
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.method is not None and self.hyperparameters:
            raise ValueError("hyperparameters: give them within method, or leave method out")
        return self

    def chosen_method(self) -> Method:
        if self.method is not None:
            return self.method
        supervised = SupervisedMethod(hyperparameters=self.hyperparameters)
        return Method(type="supervised", supervised=supervised)
