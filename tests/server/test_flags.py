"""Flags come from the config dataclasses and nothing else."""

import argparse
import dataclasses
from typing import Literal

import pytest

from engine.config import CacheConfig, LoraConfig, ModelConfig, SchedulerConfig
from server.config import ServerConfig
from server.flags import add_flags, field_docstrings, from_args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample things. Not shown."""

    max_things: int | None = None
    """Things at most;
    100 % of them by default."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    names: tuple[str, ...] = ()
    """Names."""
    is_on: bool = True
    """Switch."""
    timeout_s: float = 1.0
    """How long."""

    def __post_init__(self) -> None:
        if self.max_things == 0:
            raise ValueError("max_things: expected a positive number, got 0")


def parse(*words: str) -> Sample:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    return from_args(Sample, parser.parse_args(words))


def test_absent_flags_keep_the_defaults():
    assert parse() == Sample()


def test_every_kind_of_field_can_be_set():
    config = parse("--max-things", "3", "--kind", "b", "--names", "x", "--names", "y", "--no-is-on")
    assert config == Sample(max_things=3, kind="b", names=("x", "y"), is_on=False)


def test_the_unit_of_a_time_is_shown_beside_the_flag():
    assert parse("--timeout", "2.5").timeout_s == 2.5
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    assert "--timeout SECONDS" in parser.format_help()


def test_a_value_outside_the_choices_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--kind", "c")
    assert "invalid choice: 'c'" in capsys.readouterr().err


def test_the_configs_own_checks_run():
    with pytest.raises(ValueError, match="max_things"):
        parse("--max-things", "0")


def test_help_shows_docstrings_and_defaults():
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    text = " ".join(parser.format_help().split())
    assert "Things at most; 100 % of them by default." in text
    assert "(default: on)" in text


def test_a_field_without_docstring_is_a_mistake_of_ours():
    @dataclasses.dataclass
    class Bare:
        """Bare."""

        field: int = 0

    with pytest.raises(TypeError, match=r"Bare\.field has no docstring"):
        add_flags(argparse.ArgumentParser(), Bare)


@pytest.mark.parametrize(
    "config_class", [ModelConfig, CacheConfig, SchedulerConfig, LoraConfig, ServerConfig]
)
def test_every_config_makes_flags(config_class):
    parser = argparse.ArgumentParser()
    add_flags(parser, config_class)
    assert from_args(config_class, parser.parse_args([])) == config_class()
    assert field_docstrings(config_class).keys() == {
        field.name for field in dataclasses.fields(config_class)
    }
