"""The page in a real headless Chromium, against a stand-in for the API."""

import re
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from tests.ui.browsing import (  # noqa: E402
    CHROMIUM,
    ask,
    box,
    button,
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


def test_the_page_introduces_itself(page):
    expect(page).to_have_title("Herd")
    expect(page.locator("#herd-notice")).to_contain_text("the demo model, a toy")
    icon = page.request.get(f"{page.url}favicon.ico")
    assert icon.ok and icon.headers["content-type"] == "image/svg+xml"
    picker(page, "Who answers").click()
    names = page.get_by_role("option").all_inner_texts()
    assert [re.sub(r"^\W+", "", name) for name in names] == [
        "herd-demo (base)",
        "guanaco · gen 3",
        "pirate · gen 3",
    ]


def test_the_box_opens_and_has_the_focus_once_there_is_a_model_to_ask(page, api):
    expect(box(page)).to_be_focused()
    api.required_key = "secret-2"
    page.reload()
    expect(page.locator("#herd-notice")).to_contain_text("asks for an API key")
    expect(box(page)).to_be_disabled()
    key = page.get_by_label("API key")
    key.fill("secret-2")
    key.press("Enter")
    expect(box(page)).to_be_focused()
    ask(page, "hello")
    wait_for_answer(page)


def test_who_scores_answers_is_not_asked_for_any(page, api):
    api.training.judges.append("pirate")
    page.get_by_role("button", name="↻ Adapters").click()
    wait_until(lambda: picker_options(page) == ["guanaco · gen 3", "herd-demo (base)"], "offered")


def picker_options(page):
    picker(page, "Who answers").click()
    names = page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    return sorted(re.sub(r"^\W+", "", name) for name in names)


def test_an_answer_streams_and_is_labelled(page):
    ask(page, "slow")
    line = bylines(page)
    expect(line).to_have_text(
        re.compile(r"guanaco · generation 4 · \d+ tokens · [\d.]+ tokens/s · …")
    )
    early = page.get_by_text("word1 ").first.inner_text()
    expect(page.get_by_text("word60 ")).to_be_visible()
    assert "word60 " not in early
    page.get_by_role("button", name="Stop").click()
    button(page, "Clear").click()
    expect(bylines(page)).to_have_count(0)
    ask(page, "What is NF4?")
    assert re.fullmatch(
        r"guanaco · generation 4 · 5 tokens · [\d.]+ tokens/s", wait_for_answer(page)
    )
    expect(page.get_by_text("guanaco says: What is NF4?")).to_be_visible()


def test_stop_ends_the_request_and_keeps_the_text(page, api):
    ask(page, "slow")
    expect(page.get_by_text("word5 ")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(bylines(page)).to_have_text(re.compile("· stopped$"))
    wait_until(lambda: api.num_disconnects == 1 and api.num_running == 0, "the request goes on")
    expect(page.get_by_text("word5 ")).to_be_visible()
    ask(page, "and now?")
    wait_for_answer(page, 2)
    assert [m["role"] for m in api.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert "word5 " in api.bodies[1]["messages"][1]["content"]


def test_closing_the_page_ends_the_request(page, api):
    ask(page, "slow")
    expect(page.get_by_text("word5 ")).to_be_visible()
    page.close()
    wait_until(lambda: api.num_disconnects == 1 and api.num_running == 0, "the request goes on")


def test_regenerate_asks_the_same_again(page, api):
    ask(page, "one")
    wait_for_answer(page, 1)
    ask(page, "two")
    wait_for_answer(page, 2)
    button(page, "Regenerate").click()
    wait_until(lambda: len(api.bodies) == 3, "nothing was asked")
    wait_for_answer(page, 2)
    page.get_by_role("button", name="Retry").last.click()
    wait_until(lambda: len(api.bodies) == 4, "nothing was asked")
    wait_for_answer(page, 2)
    assert api.bodies[1] == api.bodies[2] == api.bodies[3]


def test_an_edited_question_is_answered_and_what_followed_is_dropped(page, api):
    ask(page, "first")
    wait_for_answer(page, 1)
    ask(page, "second")
    wait_for_answer(page, 2)
    page.get_by_role("button", name="Edit").first.click()
    editor = page.locator("textarea:visible").first
    editor.fill("changed")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("guanaco says: changed")).to_be_visible()
    wait_for_answer(page, 1)
    assert api.bodies[-1]["messages"] == [{"role": "user", "content": "changed"}]


def test_undo_puts_the_question_back_into_the_box(page):
    ask(page, "first")
    wait_for_answer(page, 1)
    ask(page, "second")
    wait_for_answer(page, 2)
    button(page, "Undo").click()
    expect(box(page)).to_have_value("second")
    expect(bylines(page)).to_have_count(1)


def test_adapters_switch_in_mid_conversation(page, api):
    ask(page, "one")
    wait_for_answer(page, 1)
    pick(page, "Who answers", "pirate")
    ask(page, "two")
    wait_for_answer(page, 2)
    assert [line.split(" ")[0] for line in bylines(page).all_inner_texts()] == ["guanaco", "pirate"]
    assert [body["model"] for body in api.bodies] == ["guanaco", "pirate"]
    assert api.bodies[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "guanaco says: one"},
        {"role": "user", "content": "two"},
    ]


def test_system_prompt_and_sampling_reach_the_api(page, api):
    page.get_by_label("System prompt").fill("Be brief.")
    values = {
        "Temperature": "0.2",
        "Top p": "0.5",
        "Top k": "40",
        "Min p": "0.1",
        "Max tokens": "77",
        "Repetition penalty": "1.3",
    }
    for title, value in values.items():
        field = page.get_by_label(f"number input for {title}")
        field.fill(value)
        field.press("Tab")
    page.get_by_label("Seed").fill("1234")
    ask(page, "hello")
    wait_for_answer(page)
    body = api.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body | {"messages": None} == {
        "model": "guanaco",
        "messages": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.2,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "max_tokens": 77,
        "repetition_penalty": 1.3,
        "seed": 1234,
    }


def test_a_seed_that_is_no_number_is_refused_before_anything_is_asked(page, api):
    page.get_by_label("Seed").fill("lucky")
    ask(page, "hello")
    expect(page.get_by_text("Seed: expected a whole number or nothing")).to_be_visible()
    expect(box(page)).to_have_value("hello")
    assert api.bodies == []


def test_a_model_without_chat_template_continues_the_text(page, api):
    pick(page, "Who answers", "herd-demo")
    ask(page, "Once upon a time")
    line = wait_for_answer(page)
    assert line.startswith("herd-demo · no chat template: continues your text · 3 tokens")
    expect(page.get_by_text("and so on")).to_be_visible()
    assert api.bodies[-1]["prompt"] == "Once upon a time"


def test_two_adapters_answer_side_by_side_at_the_same_time(page, api):
    page.get_by_role("tab", name="Side by side").click()
    expect(picker(page, "Left")).to_have_value("guanaco · gen 3")
    expect(picker(page, "Right")).to_have_value("pirate · gen 3")
    ask(page, "slow")
    expect(page.get_by_text("word9 ")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(bylines(page)).to_have_text(
        [re.compile("guanaco.*stopped"), re.compile("pirate.*stopped")]
    )
    wait_until(lambda: api.num_disconnects == 2, "a request goes on")
    assert api.max_running == 2
    button(page, "Clear").click()
    ask(page, "hello")
    expect(page.get_by_text("guanaco says: hello")).to_be_visible()
    expect(page.get_by_text("pirate says: hello")).to_be_visible()


def test_an_error_is_shown_and_the_conversation_goes_on(page, api):
    ask(page, "one")
    wait_for_answer(page, 1)
    ask(page, "fail")
    wait_for_answer(page, 2)
    error = page.locator(".herd-chat .herd-error")
    expect(error).to_have_text("The engine is restarting. (Try again in 2 s.)")
    toast = page.get_by_role("status").filter(has_text="The engine is restarting.")
    expect(toast).to_be_visible()
    ask(page, "two")
    wait_for_answer(page, 3)
    assert [message["content"] for message in api.bodies[-1]["messages"]] == [
        "one",
        "guanaco says: one",
        "two",  # the question that failed is not asked again
    ]


def test_a_worker_that_dies_in_mid_answer_leaves_the_text_that_came(page):
    ask(page, "break")
    wait_for_answer(page)
    expect(page.get_by_text("guanaco says:")).to_be_visible()
    expect(page.locator(".herd-chat .herd-error")).to_have_text("The engine worker died.")


def test_a_protected_api_is_reached_only_with_the_visitors_own_key(page, api):
    api.required_key = "secret-1"
    page.reload()
    key = page.get_by_label("API key")
    expect(key).to_be_visible()
    expect(page.locator("#herd-notice")).to_contain_text("asks for an API key")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#herd-notice")).to_contain_text("The API key is not valid here.")
    key.fill("secret-1")
    page.get_by_role("button", name="Use this key").click()
    expect(key).to_be_hidden()
    ask(page, "hello")
    wait_for_answer(page)
    page.reload()
    expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))  # still this tab


def test_the_page_waits_for_a_server_that_is_loading(page, api):
    api.is_ready = False
    page.reload()
    expect(page.locator("#herd-notice")).to_contain_text("The model is being loaded (weights 1/3).")
    expect(picker(page, "Who answers")).to_have_value("herd-demo (base)")
    api.is_ready = True
    expect(picker(page, "Who answers")).to_have_value("guanaco · gen 3")
    expect(page.locator("#herd-notice")).to_contain_text("the demo model, a toy")


def test_a_restart_of_the_server_in_mid_answer_keeps_the_conversation(context, served_api):
    served_api.api.reset()
    page = context.new_page()
    page.goto(served_api.url)
    expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))
    ask(page, "slow")
    expect(page.get_by_text("word5 ")).to_be_visible()
    served_api.stop()
    expect(page.get_by_text("The connection to the server broke.")).to_be_visible()
    served_api.start()
    page.get_by_role("button", name="Stop").click()
    ask(page, "again")
    expect(page.get_by_text("guanaco says: again")).to_be_visible()
    expect(page.get_by_text("The connection to the server broke.")).to_be_hidden()
    expect(page.get_by_text("word5 ")).to_be_visible()
    page.close()


def test_copying_an_answer_leaves_out_its_byline(context, page):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "hello")
    wait_for_answer(page)
    page.get_by_role("button", name="Copy message").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "guanaco says: hello"


def test_a_picture_in_an_answer_is_not_fetched_from_its_host(context, served_api):
    page = context.new_page()
    hosts, refusals = set(), []
    page.on("response", lambda response: hosts.add(urlsplit(response.url).netloc))
    page.on("console", lambda log: refusals.append(log.text) if log.type == "error" else None)
    page.goto(served_api.url)
    expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))
    ask(page, "![x](http://127.0.0.2:9/x.png)")
    wait_for_answer(page)
    expect(page.locator("img[src*='127.0.0.2']").first).to_be_attached()
    wait_until(lambda: page.evaluate("1") and refusals, "the picture was not refused")
    assert "Content Security Policy" in refusals[0]
    assert hosts == {urlsplit(served_api.url).netloc}


def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "hello")
    wait_for_answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(box(page)).to_be_visible()


def thumb(page, name):
    return page.get_by_role("button", name=name, exact=True).locator("visible=true").last


def test_thumbs_are_kept_and_a_second_click_takes_them_back(page, api):
    ask(page, "hello")
    wait_for_answer(page)
    thumb(page, "Like").click()
    expect(bylines(page)).to_have_text(re.compile("· noted: good$"))
    thumb(page, "Like").click()
    expect(bylines(page)).to_have_text(re.compile("tokens/s$"))
    assert api.judgements == [
        {"response_id": "guanaco-0", "rating": "up"},
        {"response_id": "guanaco-0", "rating": "none"},
    ]
    ask(page, "and now?")  # the verdict is no part of the conversation
    wait_for_answer(page, 2)
    assert [m["content"] for m in api.bodies[-1]["messages"]] == [
        "hello",
        "guanaco says: hello",
        "and now?",
    ]


def test_after_thumbs_down_a_better_answer_can_be_given(page, api):
    ask(page, "hello")
    wait_for_answer(page)
    better = page.get_by_label("What would have been a better answer?")
    expect(better).to_be_hidden()
    thumb(page, "Dislike").click()
    better.fill("good day")
    page.get_by_role("button", name="Keep").click()
    expect(bylines(page)).to_have_text(re.compile("· noted: bad, with your better answer$"))
    expect(better).to_be_hidden()
    assert api.judgements == [
        {"response_id": "guanaco-0", "rating": "down"},
        {"response_id": "guanaco-0", "preferred": "good day"},
    ]


def test_the_better_of_two_answers_is_kept(page, api):
    page.get_by_role("tab", name="Side by side").click()
    ask(page, "hello")
    wait_for_answer(page, 2)
    button(page, "Right is better").click()
    expect(bylines(page).first).to_have_text(re.compile("· noted: the worse one$"))
    expect(bylines(page).last).to_have_text(re.compile("· noted: the better one$"))
    loser = next(i for i in api.response_ids if i.startswith("guanaco"))
    assert api.judgements == [{"response_id": loser, "preferred": "pirate says: hello"}]
    ask(page, "and now?")
    wait_for_answer(page, 4)
    button(page, "Left is better").click()
    expect(page.get_by_text("Two answers can be compared where")).to_be_visible()
    assert len(api.judgements) == 1  # the conversations differ since the first answers


def test_an_answer_that_nobody_remembers_cannot_be_judged(page, api):
    ask(page, "hello")
    wait_for_answer(page)
    api.response_ids.clear()
    thumb(page, "Like").click()
    expect(page.get_by_text("No such response is remembered.")).to_be_visible()
    expect(bylines(page)).to_have_text(re.compile("tokens/s$"))
    button(page, "Clear").click()
    pick(page, "Who answers", "herd-demo")
    ask(page, "Once")
    wait_for_answer(page)
    thumb(page, "Like").click()
    expect(page.get_by_text("Only answers that a chat gave")).to_be_visible()
