"""Conversations as the chat component holds them: the browser's copy is the only one.

A message is {"role", "content": [part, ...]}, a part is {"type": "text", "text"}. The
first part is what was said; an answer has a second, its byline: who answered, how fast, how it
ended, what the visitor thought of it, and in a data attribute the API's id of the response. The
browser sends the conversation with each event, so a restarted server carries on with it.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from ui.answer import Answer

Message = dict[str, Any]
History = list[Message]

FINISH_NOTES = {"length": "cut at max tokens", "stop": "", "cancelled": "cancelled by the server"}


def user_message(text: str) -> Message:
    """What the visitor said, exactly: as a part, because plain strings lose their indentation."""
    return {"role": "user", "content": [_part(text)]}


def answer_message(answer: Answer) -> Message:
    """The answer as it stands, with its byline."""
    return {"role": "assistant", "content": [_part(answer.text), _part(byline(answer))]}


def byline(answer: Answer) -> str:
    """Who answered, how many tokens, how fast, how it ended: one line of HTML."""
    notes = []
    if answer.generation is not None:
        notes.append(f"generation {answer.generation}")
    if answer.is_continuation:
        notes.append("no chat template: continues your text")
    if answer.token_count:
        notes.append(f"{answer.token_count} token{'s' if answer.token_count > 1 else ''}")
    if answer.tokens_per_s is not None:
        notes.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if not answer.is_done:
        notes.append("…")
    elif answer.is_stopped:
        notes.append("stopped")
    elif answer.error is None and not answer.text:
        notes.append("empty answer")
    elif answer.error is None and answer.finish_reason is not None:
        notes.append(FINISH_NOTES.get(answer.finish_reason, answer.finish_reason))
    line = _byline_html(answer.model, notes, answer.response_id)
    if answer.error is not None:
        line += f'<span class="herd-error">{escape(str(answer.error))}</span>'
    return line


def text_of(message: Message) -> str:
    """What was said, without the byline."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def api_messages(history: History, system_prompt: str) -> list[dict[str, str]]:
    """The conversation for the API: no bylines, no questions without an answer save the last.

    A question that failed is left out because many chat templates demand that the roles alternate.
    """
    messages = []
    if system_prompt.strip():
        messages.append({"role": "system", "content": system_prompt})
    for i, message in enumerate(history):
        is_last = i == len(history) - 1
        unanswered = not is_last and not text_of(history[i + 1])
        if message["role"] == "user" and (is_last or not unanswered):
            messages.append({"role": "user", "content": text_of(message)})
        elif message["role"] == "assistant" and text_of(message):
            messages.append({"role": "assistant", "content": text_of(message)})
    return messages


def up_to_last_user(history: History, index: int | None = None) -> History:
    """The conversation up to the last question at or before `index`, ready to be answered again."""
    end = len(history) if index is None else index + 1
    while end and history[end - 1]["role"] != "user":
        end -= 1
    return history[:end]


def without_last_exchange(history: History) -> tuple[History, str]:
    """The conversation before its last question, and that question, to be put back in the box."""
    kept = up_to_last_user(history)
    return (kept[:-1], text_of(kept[-1])) if kept else ([], "")


def response_id_of(message: Message) -> str | None:
    """The API's id of an answer; None where it cannot be judged."""
    content = message["content"]
    if isinstance(content, str) or len(content) < 2:
        return None
    found = re.match(r'<span class="herd-by" data-response="([\w-]+)"', content[1]["text"])
    return found[1] if found else None


def with_verdict(message: Message, verdict: str) -> Message:
    """An answer whose byline shows what the visitor thought of it; "" takes that away."""
    said, by = message["content"]
    line = re.sub(r'<i class="herd-verdict">.*?</i>', "", by["text"])
    if verdict:
        line = line.replace("</span>", f"{_verdict_html(verdict)}</span>", 1)
    return {**message, "content": [said, _part(line)]}


def has_verdict(message: Message, verdict: str) -> bool:
    """Whether the byline shows just this."""
    content = message["content"]
    return not isinstance(content, str) and _verdict_html(verdict) in content[-1]["text"]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _verdict_html(verdict: str) -> str:
    return f'<i class="herd-verdict"> · {escape(verdict)}</i>'


def _byline_html(name: str, notes: list[str], response_id: str | None) -> str:
    line = " · ".join([f"<b>{escape(name)}</b>", *filter(None, notes)])
    data = f' data-response="{escape(response_id)}"' if response_id else ""
    return f'<span class="herd-by"{data}>{line}</span>'
