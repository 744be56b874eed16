"""Detokenising and stop strings, with random texts cut at random places."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text import AnswerText, Detokenizer, StopChecker
from server.tokenizer import Tokenizer
from tests.server.fake_engine import BOS, EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def sentencepiece_like(*pieces: str) -> Tokenizer:
    """Tokens are the given pieces; the first space of a text is not meant."""
    return Tokenizer(
        encode_text=lambda text, special: [],  # noqa: ARG005
        token_bytes=tuple(piece.encode() for piece in pieces),
        vocab_size=len(pieces),
        drops_first_space=True,
    )


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: reading character by character, the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(text=st.text())
def test_characters_come_out_whole_and_add_up(text):
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token_id) for token_id in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    # A piece is a character or nothing: never a replacement character in mid-text.
    assert all(len(piece) <= 1 for piece in pieces)


@given(data=st.binary())
def test_broken_utf8_is_replaced_as_python_does(data):
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(map(detokenizer.push, data)) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace")


def test_control_tokens_are_not_shown_unless_asked_for():
    tokens = [BOS, ord("a"), EOS]
    assert "".join(map(Detokenizer(TOKENIZER).push, tokens)) == "a"
    shown = Detokenizer(TOKENIZER, skip_special_tokens=False)
    assert "".join(map(shown.push, tokens)) == "<s>a</s>"


def test_the_first_space_is_dropped_from_a_message_and_kept_in_a_continuation():
    tokenizer = sentencepiece_like(" Hello", " world")
    message = Detokenizer(tokenizer)
    assert message.push(0) + message.push(1) == "Hello world"
    continuation = Detokenizer(tokenizer, prompt_token_ids=[0])
    assert continuation.push(1) == " world"


def test_a_continuation_of_control_tokens_only_is_a_beginning():
    tokenizer = sentencepiece_like(" Hello", "<s>")
    tokenizer = Tokenizer(
        encode_text=tokenizer.encode_text,
        token_bytes=tokenizer.token_bytes,
        vocab_size=2,
        special_ids=frozenset({1}),
        drops_first_space=True,
    )
    assert Detokenizer(tokenizer, prompt_token_ids=[1]).push(0) == "Hello"


SMALL = st.text(alphabet="ab#é", max_size=30)
STOPS = st.lists(st.text(alphabet="ab#é", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=500)
@given(text=SMALL, stops=STOPS, data=st.data())
def test_stop_strings_are_found_wherever_the_text_is_cut(text, stops, data):
    expected, expected_stop = first_stop(text, stops)
    checker, released = StopChecker(stops), ""
    position = 0
    while position < len(text) and checker.found is None:
        size = data.draw(st.integers(1, 7))
        released += checker.push(text[position : position + size])
        assert expected.startswith(released)  # nothing of the stop string has leaked
        position += size
    if checker.found is None:
        released += checker.finish()
    assert (released, checker.found) == (expected, expected_stop)


@settings(max_examples=300)
@given(text=SMALL, stops=STOPS)
def test_held_back_text_is_the_least_possible(text, stops):
    checker, released = StopChecker(stops), ""
    for end in range(1, len(text) + 1):
        released += checker.push(text[end - 1])
        if checker.found is not None:
            return
        held = text[len(released) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


@settings(max_examples=300)
@given(
    text=st.text(alphabet="ab#é🦙", max_size=20),
    stops=st.lists(st.text(alphabet="ab#é🦙", min_size=1, max_size=3), max_size=3),
    min_tokens=st.integers(0, 10),
)
def test_tokens_are_released_with_their_text_and_in_order(text, stops, min_tokens):
    answer = AnswerText(Detokenizer(TOKENIZER), stops, min_tokens=min_tokens)
    released, spans = "", []
    for token_id in text.encode():
        new, new_spans = answer.push(token_id)
        released += new
        spans += new_spans
        assert all(span.end <= len(released) for span in spans)
        if answer.stop is not None:
            break
    new, new_spans = answer.finish()
    released, spans = released + new, spans + new_spans
    assert text.startswith(released)
    if answer.stop is None:
        assert released == text
        assert len(spans) == len(text.encode())
    else:
        assert text.startswith(released + answer.stop)
        assert all(span.start < len(released) or span.end <= len(released) for span in spans)
    assert [span.start for span in spans] == sorted(span.start for span in spans)


def test_stop_strings_count_from_min_tokens_on():
    answer = AnswerText(Detokenizer(TOKENIZER), ["a"], min_tokens=2)
    texts = [answer.push(ord("a"))[0] for _ in range(3)]
    assert texts == ["a", "a", ""]
    assert answer.stop == "a"


@pytest.mark.parametrize(("stops", "text"), [(["b", "abb"], "a"), (["ab", "b"], "")])
def test_of_stops_that_end_together_the_longest_wins(stops, text):
    checker = StopChecker(stops)
    assert checker.push("ab") == text
    assert checker.found == ("b" if stops[1] == "abb" else "ab")
