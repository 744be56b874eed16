import json

from ui import conversation as talk
from ui.answer import Answer
from ui.api_types import ApiError, Piece


def answered(text="Hi.", **fields):
    answer = Answer(model="guanaco", is_done=True, text=text)
    for name, value in fields.items():
        setattr(answer, name, value)
    return answer


def exchange(question, answer):
    return [talk.user_message(question), talk.answer_message(answered(answer))]


def test_a_conversation_survives_json_and_loses_its_bylines_for_the_api():
    history = json.loads(
        json.dumps([*exchange("  indented\n  text", "Yes."), talk.user_message("And?")])
    )
    assert talk.api_messages(history, " ") == [
        {"role": "user", "content": "  indented\n  text"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And?"},
    ]


def test_the_system_prompt_goes_first():
    messages = talk.api_messages([talk.user_message("Hello")], "Be brief.")
    assert [message["role"] for message in messages] == ["system", "user"]


def test_questions_without_an_answer_are_left_out_but_the_last():
    history = [*exchange("lost", ""), *exchange("kept", "Yes."), talk.user_message("now")]
    assert [m["content"] for m in talk.api_messages(history, "")] == ["kept", "Yes.", "now"]


def test_asking_again_starts_from_the_last_question_before_the_message():
    history = [*exchange("one", "1"), *exchange("two", "2")]
    assert talk.up_to_last_user(history) == history[:3]
    assert talk.up_to_last_user(history, 1) == history[:1]
    assert talk.up_to_last_user(history, 0) == history[:1]
    assert talk.up_to_last_user([]) == []


def test_undo_gives_back_the_question():
    history = [*exchange("one", "1"), *exchange("two", "2")]
    assert talk.without_last_exchange(history) == (history[:2], "two")
    assert talk.without_last_exchange([]) == ([], "")


def test_the_byline_names_who_answered_and_how_it_ended():
    answer = answered(generation=2, num_tokens=1, finish_reason="length", is_continuation=True)
    assert talk.byline(answer) == (
        '<span class="herd-by"><b>guanaco</b> · generation 2 · no chat template: continues your '
        "text · 1 token · cut at max tokens</span>"
    )
    assert "· stopped<" in talk.byline(answered(is_stopped=True))
    assert "· …<" in talk.byline(answered(is_done=False))


def test_names_and_errors_cannot_bring_their_own_html():
    answer = Answer(model="<i>", is_done=True, error=ApiError("<script>"))
    assert "<i>" not in talk.byline(answer) and "<script>" not in talk.byline(answer)


def test_speed_is_measured_between_the_first_and_the_last_token():
    answer = answered()
    assert answer.tokens_per_s is None
    answer.first_at, answer.last_at, answer.num_tokens = 10.0, 12.0, 5
    assert answer.tokens_per_s == 2.0


def test_the_apis_token_count_replaces_that_of_the_pieces():
    answer = Answer(model="guanaco")
    for text in ("a", "", "b"):
        answer.add(Piece(text=text))
    assert (answer.text, answer.token_count) == ("ab", 2)
    answer.add(Piece(num_tokens=7, finish_reason="stop"))
    assert answer.token_count == 7
