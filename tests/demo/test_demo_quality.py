"""The quality check asks over HTTP and judges; a stand-in server knows what is right."""

import argparse
import json

import httpx
import pytest

from bench import demo_quality
from demo.held_out import load_questions


def stand_in(answer_of):
    def answer(request):
        body = json.loads(request.content)
        assert body["temperature"] == 0
        text = answer_of(body["messages"][0]["content"])
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test")


def test_all_keywords_in_every_answer_is_a_full_score():
    answers = {
        entry["question"]: " ".join(keyword.split("|")[0] for keyword in entry["keywords"])
        for entry in load_questions()
    }
    rows = demo_quality.judge(stand_in(answers.get), "guanaco")
    assert all(row["right"] for row in rows)


def test_too_few_right_answers_fail_and_are_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_quality, "RESULT_FILE", tmp_path / "results" / "demo_quality.json")
    client = stand_in(lambda _: "Paris")
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    arguments = argparse.Namespace(model="guanaco", api_key="", require=0.8)
    assert demo_quality.run("http://test", arguments) == 1
    result = json.loads((tmp_path / "results" / "demo_quality.json").read_text())
    assert result["num_questions"] == 60
    assert result["num_right"] == 1
    assert "1 of 60 right" in capsys.readouterr().out


def test_an_error_of_the_server_is_shown():
    refuse = httpx.MockTransport(lambda _: httpx.Response(404, text="no model 'x'"))
    client = httpx.Client(transport=refuse, base_url="http://test")
    with pytest.raises(SystemExit, match=r"404: no model 'x'"):
        demo_quality.ask(client, "x", "Hi")
