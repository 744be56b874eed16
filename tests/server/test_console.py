"""What the operator is told when the server is ready, and while it records decode steps."""

import dataclasses
import json
import shlex
import sys

import pytest

from engine.api import RecordingProgress
from server.console import announce, show_recording
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


def recording(num_recorded: int, *, is_recording: bool) -> RecordingProgress:
    return RecordingProgress(num_recorded=num_recorded, num_sizes=12, is_recording=is_recording)


def on_screen(text: str) -> list[str]:
    """What a terminal shows: a carriage return goes back, what follows is written over."""
    lines = [""]
    for part in text.split("\n"):
        for piece in part.split("\r"):
            lines[-1] = piece + lines[-1][len(piece) :]
        lines.append("")
    return [line.rstrip() for line in lines]


def test_on_a_terminal_a_bar_stands_there_while_a_step_is_recorded(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_recording(recording(3, is_recording=True))
    text = capsys.readouterr().err
    shown = on_screen(text)[0]
    assert shown.startswith("recording decode steps:  25%") and shown.endswith("| 3/12")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_recording(recording(4, is_recording=False))
    assert not "".join(on_screen(text + capsys.readouterr().err))


def test_a_log_line_takes_the_bar_s_place(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = "2026-01-01 00:00:00,000 worker WARNING Decode steps are not recorded as graphs: no."
    show_recording(recording(3, is_recording=True))
    sys.stderr.write(f"{line}\n")
    show_recording(recording(3, is_recording=False))
    assert on_screen(capsys.readouterr().err) == [line, "", ""]


def test_a_log_file_gets_no_bars(capsys):
    show_recording(recording(3, is_recording=True))
    assert capsys.readouterr().err == ""
