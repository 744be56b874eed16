"""What the operator is told when the server is ready."""

import dataclasses
import json
import shlex

import pytest

from server.console import announce
from tests.server.fake_engine import add_adapter, build_state


def printed_command(state, capsys) -> list[str]:
    announce(state.engine.info, state, "http://127.0.0.1:8000", 1.0)
    text = capsys.readouterr().out
    return shlex.split(text.partition("try")[2].replace("\\\n", " "))


@pytest.mark.parametrize(
    ("adapter", "path", "field"),
    [
        ({"is_guanaco": True}, "/v1/chat/completions", "messages"),
        ({"is_guanaco": False}, "/v1/completions", "prompt"),
    ],
)
def test_the_command_to_try_is_one_that_the_model_can_answer(adapter, path, field, capsys):
    state = build_state()
    state.tokenizer = dataclasses.replace(state.tokenizer, chat_template=None)
    add_adapter(state, "ada", **adapter)
    command = printed_command(state, capsys)
    body = json.loads(command[command.index("-d") + 1])
    assert command[1].endswith(f"8000{path}")
    assert body["model"] == "ada"
    assert field in body


def test_without_adapters_the_base_is_named(capsys):
    command = printed_command(build_state(), capsys)
    assert json.loads(command[command.index("-d") + 1])["model"] == "base"


def test_where_keys_are_set_the_command_carries_one_but_does_not_print_it(capsys):
    command = printed_command(build_state(api_key=("secret",)), capsys)
    assert "Authorization: Bearer KEY" in command
    assert not any("secret" in word for word in command)
