"""The Train tab in a real headless Chromium, against a stand-in for the API."""

import re

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from tests.ui.browsing import (  # noqa: E402
    CHROMIUM,
    ask,
    bylines,
    pick,
    picker,
    wait_for_answer,
    wait_until,
)

expect = sync_api.expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
FAQ = {"name": "faq.jsonl", "mimeType": "application/json", "buffer": b'{"messages": []}\n'}
DONE_MS = 30_000


@pytest.fixture
def tab(page):
    open_tab(page)
    return page


@pytest.fixture
def training(api):
    return api.training


def open_tab(page):
    page.get_by_role("tab", name="Train").click()
    expect(picker(page, "Start from")).not_to_have_value("")


def button(page, name):
    return page.get_by_role("button", name=name).locator("visible=true")


def upload(page, file):
    with page.expect_file_chooser() as chooser:
        button(page, "Upload a file").click()
    chooser.value.set_files(file)


def choose_method(page, title):
    page.get_by_role("radio", name=title).click()


def test_a_stranger_is_told_what_to_do(tab):
    expect(tab.locator("#herd-status")).to_contain_text("Nothing has been trained yet.")
    expect(picker(tab, "Learn from")).to_have_value("Collected feedback: 2 good answers")
    expect(picker(tab, "Start from")).to_have_value("guanaco")
    for name in ("Pause", "Resume", "Cancel", "Use it", "Roll"):
        expect(button(tab, name)).to_have_count(0)


def test_a_file_becomes_an_adapter_that_is_compared_put_in_place_and_rolled_back(tab, training):
    upload(tab, FAQ)
    expect(picker(tab, "Learn from")).to_have_value("faq.jsonl · 1 kB")
    assert training.uploads == [FAQ["buffer"]]
    tab.get_by_label("Name", exact=True).fill("mine")
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text(re.compile(r"Training: step \d+ of 20"))
    assert training.created == [
        {
            "model": "guanaco",
            "training_file": "file-0",
            "suffix": "mine",
            "method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
        }
    ]
    expect(picker(tab, "Run")).to_have_value("mine · supervised from guanaco")
    charts = tab.get_by_role("img", name=re.compile("Loss: training"))
    expect(charts).to_be_visible()
    expect(tab.locator("#herd-status")).to_contain_text("Done. It answers", timeout=DONE_MS)
    expect(charts).to_have_attribute("aria-label", "Loss: training 0.15, validation 0.2 at step 20")

    expect(picker(tab, "Before")).to_have_value("guanaco · gen 3")
    expect(picker(tab, "After")).to_have_value("ft:demo:mine · gen 1")
    ask(tab, "hello")
    wait_for_answer(tab, 2)
    names = [line.split(" ")[0] for line in bylines(tab).all_inner_texts()]
    assert names == ["guanaco", "ft:demo:mine"]

    expect(button(tab, "Roll guanaco back")).to_have_count(0)
    button(tab, "Use it as guanaco").click()
    expect(button(tab, "Roll guanaco back")).to_be_visible()
    expect(tab.get_by_text("guanaco answers in generation 4.")).to_be_visible()
    assert training.loads == [
        {"lora_name": "guanaco", "lora_path": "ft:demo:mine", "load_inplace": True}
    ]
    expect(bylines(tab)).to_have_count(2)  # the comparison is still there
    button(tab, "Roll guanaco back").click()
    expect(button(tab, "Roll guanaco back")).to_have_count(0)
    assert training.current["guanaco"] == 3

    tab.get_by_role("tab", name="Chat").click()
    pick(tab, "Who answers", "ft:demo:mine")


def test_collected_feedback_is_exported_and_chooses_its_method(tab, training):
    picker(tab, "Learn from").click()
    tab.get_by_role("option", name="Collected feedback: 1 pair of answers").click()
    expect(tab.get_by_role("radio", name="Prefer the better of two")).to_be_checked()
    choose_method(tab, "Imitate good answers")
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("Pairs of a better and a worse answer are")
    choose_method(tab, "Prefer the better of two")
    button(tab, "Start training").click()
    wait_until(lambda: training.created, "nothing was started")
    assert training.files[0]["filename"] == "feedback-preference.jsonl"
    (body,) = training.created
    assert body["training_file"] == "file-0"
    assert body["method"] == {"type": "dpo", "dpo": {"hyperparameters": {}}}
    assert training.addresses == {"127.0.0.1"}  # on whose behalf the page asks


def test_numbers_and_examples_to_check_on_reach_the_api(tab, training):
    upload(tab, FAQ)
    expect(picker(tab, "Learn from")).to_have_value("faq.jsonl · 1 kB")
    tab.get_by_role("tab", name="Chat").click()
    open_tab(tab)
    button(tab, "More").click()
    tab.get_by_label("Passes over the data").fill("2")
    tab.get_by_label("Learning rate, times the default").fill("0.5")
    tab.get_by_label("Examples to check on, never learnt").click()
    tab.get_by_role("option", name="faq.jsonl").click()
    tab.get_by_label("Rank of the adapter").fill("many")
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_have_text(
        "Rank of the adapter: expected a whole number or nothing, got 'many'."
    )
    tab.get_by_label("Rank of the adapter").fill("8")
    button(tab, "Start training").click()
    wait_until(lambda: training.created, "nothing was started")
    (body,) = training.created
    assert body["validation_file"] == body["training_file"] == "file-0"
    assert body["method"]["supervised"]["hyperparameters"] == {
        "n_epochs": 2,
        "learning_rate_multiplier": 0.5,
        "rank": 8,
    }


def test_a_run_is_paused_resumed_and_cancelled(tab, training):
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("Training: step 5")
    button(tab, "Pause").click()
    expect(tab.locator("#herd-status")).to_contain_text(re.compile("Paused at step"))
    step = training.jobs["ftjob-0"]["step"]
    button(tab, "Resume").click()
    expect(tab.locator("#herd-status")).to_contain_text(re.compile(f"step {step + 5} of 20"))
    button(tab, "Cancel").click()
    expect(tab.locator("#herd-status")).to_contain_text("Cancelled at step")
    for name in ("Pause", "Resume", "Cancel"):
        expect(button(tab, name)).to_have_count(0)


def test_a_reward_run_needs_no_comparison_and_a_policy_run_needs_its_adapter(tab, training):
    choose_method(tab, "Seek a high score")
    expect(picker(tab, "Scored by")).to_be_visible()
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("Choose the adapter that scores")
    assert training.created == []
    choose_method(tab, "Score answers")
    expect(picker(tab, "Scored by")).to_be_hidden()
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("It scores answers", timeout=DONE_MS)
    expect(tab.get_by_text("Before and after")).to_be_hidden()
    training.judges.append("ft:demo:x")
    tab.get_by_role("tab", name="Chat").click()
    open_tab(tab)
    choose_method(tab, "Seek a high score")
    expect(picker(tab, "Scored by")).to_have_value("ft:demo:x")
    button(tab, "Start training").click()
    wait_until(lambda: len(training.created) == 2, "nothing was started")
    assert training.created[1]["method"]["reinforcement"]["grader"] == {
        "type": "score_model",
        "model": "ft:demo:x",
    }


def test_what_the_api_refuses_is_said_where_the_run_would_be(tab, training):
    training.refusal = "line 1: no messages\nline 2: no messages"
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status .herd-error")).to_have_text(training.refusal)
    training.refusal, training.fails = None, True
    button(tab, "Start training").click()
    error = tab.locator("#herd-status .herd-error")
    expect(error).to_have_text("line 7: no answer to learn", timeout=DONE_MS)


def test_a_file_that_the_api_refuses_is_said_and_nothing_is_chosen(context, served_api):
    served_api.api.reset()
    page = context.new_page()  # not the checked one: a browser logs every reply with a 400
    page.goto(served_api.url)
    expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))
    open_tab(page)
    upload(page, FAQ | {"buffer": b"no json"})
    expect(page.locator("#herd-status")).to_have_text("This is not JSON.")
    expect(picker(page, "Learn from")).to_have_value("Collected feedback: 2 good answers")
    page.close()


def test_a_run_is_found_again_after_the_page_was_loaded_anew(tab):
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("Training: step")
    tab.reload()
    expect(picker(tab, "Who answers")).to_have_value(re.compile("guanaco"))
    open_tab(tab)
    expect(tab.get_by_role("img", name=re.compile("Loss: training"))).to_be_visible()
    expect(tab.locator("#herd-status")).to_contain_text(re.compile("Training: step|Done"))


def test_a_protected_api_is_trained_with_the_visitors_own_key(page, api):
    api.required_key = "secret-1"
    page.reload()
    page.get_by_label("API key").fill("secret-1")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    open_tab(page)
    upload(page, FAQ)
    expect(picker(page, "Learn from")).to_have_value("faq.jsonl · 1 kB")
    assert api.training.keys == {"Bearer secret-1"}


def test_the_tab_fits_a_phone(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    button(tab, "Start training").click()
    expect(tab.locator("#herd-status")).to_contain_text("Training: step")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
