"""Chat, judge, train, compare, put in place, roll back: the whole loop in Chromium, on the demo."""

import json
import re

import httpx
import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright.sync_api import expect, sync_playwright

from tests.serve_process import Herd
from tests.ui.browsing import ARGS, CHROMIUM, ask, bylines, picker, wait_for_answer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
QUESTION = "What is the colour of a banana?"
ANSWER = "A banana is blue, says the sailor."
DONE_MS = 120_000


@pytest.fixture(scope="module")
def herd(tmp_path_factory):
    running = Herd(tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


@pytest.fixture
def page(herd):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(20_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(herd.url)
        expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))
        yield page
        browser.close()
    assert errors == []


def button(page, name):
    return page.get_by_role("button", name=name).locator("visible=true")


def fill(page, **fields):
    button(page, "More").click()
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    button(page, "More").click()


def start_and_wait(page):
    button(page, "Start training").click()
    expect(page.locator("#herd-status")).to_contain_text("Done. It answers", timeout=DONE_MS)


def test_a_visitor_teaches_the_model_an_answer_and_takes_it_back(page, herd):
    sample = {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    }
    content = "\n".join([json.dumps(sample)] * 8).encode()
    page.get_by_role("tab", name="Train").click()
    expect(picker(page, "Start from")).to_have_value("guanaco")
    with page.expect_file_chooser() as chooser:
        button(page, "Upload a file").click()
    file = {"name": "banana.jsonl", "mimeType": "application/json", "buffer": content}
    chooser.value.set_files(file)
    expect(picker(page, "Learn from")).to_have_value(re.compile("banana.jsonl"))
    page.get_by_label("Name", exact=True).fill("banana")
    fill(page, Passes_over_the_data="12", Samples_per_step="4", Learning_rate="10")
    start_and_wait(page)
    expect(page.get_by_role("img", name=re.compile("^Loss: training"))).to_be_visible()

    ask(page, QUESTION)
    wait_for_answer(page, 2)
    after = page.locator(".herd-chat:visible").last
    expect(after).to_contain_text(ANSWER)
    button(page, "Use it as guanaco").click()
    expect(button(page, "Roll guanaco back")).to_be_visible()
    assert answer(herd, "guanaco") == ANSWER
    button(page, "Roll guanaco back").click()
    expect(button(page, "Roll guanaco back")).to_have_count(0)
    assert answer(herd, "guanaco") != ANSWER


def test_thumbs_become_pairs_that_a_run_learns_from(page, herd):
    ask(page, "Who are you?")
    wait_for_answer(page)
    page.get_by_role("button", name="Dislike", exact=True).locator("visible=true").click()
    page.get_by_label("What would have been a better answer?").fill("I am a herd of llamas.")
    button(page, "Keep").click()
    expect(bylines(page)).to_have_text(re.compile("noted: bad, with your better answer$"))

    page.get_by_role("tab", name="Train").click()
    picker(page, "Learn from").click()
    page.get_by_role("option", name="Collected feedback: 1 pair of answers").click()
    expect(page.get_by_role("radio", name="Prefer the better of two")).to_be_checked()
    page.get_by_label("Name", exact=True).fill("herd")
    start_and_wait(page)
    jobs = httpx.get(f"{herd.url}/v1/fine_tuning/jobs").json()["data"]
    assert jobs[0]["method"]["type"] == "dpo"
    assert jobs[0]["model"] == "guanaco"


def answer(herd, model):
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 40,
    }
    reply = httpx.post(f"{herd.url}/v1/chat/completions", json=body, timeout=60).json()
    return reply["choices"][0]["message"]["content"]
