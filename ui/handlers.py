"""What happens on the events of a conversation: ask, ask again, edit, undo, stop, clear.

Handlers take the raw values of all inputs by component and give back what changes, by component.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from html import escape
from typing import Any, cast

import gradio as gr
from gradio.components import Component

from ui import conversation as talk
from ui.answer import Answer, Question, answer_together
from ui.api_types import Sampling, Visitor
from ui.client import Client
from ui.conversation import History

Values = dict[Component, Any]
Updates = dict[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One tab's components: as many columns as models answer side by side."""

    pickers: Sequence[gr.Dropdown]
    chatbots: Sequence[gr.Chatbot]
    box: gr.Textbox
    again: gr.Button
    undo: gr.Button
    clear: gr.Button
    better: gr.Textbox
    """Shown after thumbs down: what would have been a better answer?"""
    left_wins: gr.Button | None = None
    """Of two answers side by side the left one is better; None where there is one column."""
    right_wins: gr.Button | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The components that shape every answer."""

    system_prompt: gr.Textbox
    sampling: Mapping[str, gr.Slider]
    """By the name of the field of `Sampling`."""
    seed: gr.Textbox

    @property
    def components(self) -> list[Component]:
        """All of them, as inputs of an event."""
        return [self.system_prompt, self.seed, *self.sampling.values()]

    def read(self, values: Values) -> Sampling:
        """The chosen values; an emptied field takes its default.

        Raises:
            ValueError: the seed is not a whole number.
        """
        chosen = {name: values[component] for name, component in self.sampling.items()}
        if seed := (values[self.seed] or "").strip():
            if not re.fullmatch(r"\d+", seed):
                raise ValueError(f"Seed: expected a whole number or nothing, got {seed!r}.")
            chosen["seed"] = int(seed)
        return Sampling(**{name: value for name, value in chosen.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """The events of one tab."""

    client: Client
    api_key: str | None
    view: View
    settings: Settings
    key_row: gr.Row
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    """By Gradio's session: set it to stop the answers that this page waits for."""

    async def ask(self, values: Values, request: gr.Request) -> AsyncIterator[Updates]:
        """Put the box's text to every column."""
        text = values[self.view.box] or ""
        histories = {}
        if text.strip():
            asked = [[*history, talk.user_message(text)] for history in self._histories(values)]
            histories = dict(enumerate(asked))
        async for updates in self._answer(histories, values, request, value=""):
            yield updates

    async def ask_again(self, values: Values, request: gr.Request) -> AsyncIterator[Updates]:
        """Answer every column's last question anew."""
        histories = [talk.up_to_last_user(history) for history in self._histories(values)]
        async for updates in self._answer(dict(enumerate(histories)), values, request):
            yield updates

    async def retry(
        self, values: Values, event: gr.RetryData, request: gr.Request
    ) -> AsyncIterator[Updates]:
        """Answer one column anew from the message whose retry sign was clicked."""
        column, index = self._place(event)
        history = talk.up_to_last_user(self._histories(values)[column], index)
        async for updates in self._answer({column: history}, values, request):
            yield updates

    async def edit(
        self, values: Values, event: gr.EditData, request: gr.Request
    ) -> AsyncIterator[Updates]:
        """Answer one column anew from a changed question; what came after it is dropped."""
        column, index = self._place(event)
        before = self._histories(values)[column][:index]
        history = [*before, talk.user_message(event.value)]
        async for updates in self._answer({column: history}, values, request):
            yield updates

    def undo(self, values: Values) -> Updates:
        """Take back the last question, into the box, and its answers."""
        pairs = [talk.without_last_exchange(history) for history in self._histories(values)]
        histories = [history for history, _ in pairs]
        question = pairs[0][1] or values[self.view.box]
        return {**self._drawn(histories), **self._idle(value=question)}

    def stop(self, request: gr.Request) -> Updates:
        """End the running answers; their own event draws how they ended."""
        if stop := self.running.get(request.session_hash or ""):
            stop.set()
            return {self.view.box: gr.skip()}
        return self._idle()  # the server was restarted meanwhile

    def clear(self) -> Updates:
        """Begin anew."""
        return self._drawn([[]] * len(self.view.chatbots))

    async def _answer(
        self, histories: dict[int, History], values: Values, request: gr.Request, **box: Any
    ) -> AsyncIterator[Updates]:
        """Stream an answer into each of these columns, whose conversations end in a question.

        `box` is what else changes about the message box when it starts.
        """
        histories = {column: history for column, history in histories.items() if history}
        models = {column: values[self.view.pickers[column]] for column in histories}
        try:
            sampling = self.settings.read(values)
            if not all(models.values()):
                raise ValueError("There is no model to ask yet: wait until the server is ready.")
        except ValueError as error:
            gr.Warning(escape(str(error)))
            histories = {}
        if not histories:
            yield self._idle()  # a handler that yields nothing would empty the box
            return
        system_prompt = values[self.settings.system_prompt] or ""
        questions = [
            Question(
                model=models[column],
                messages=talk.api_messages(history, system_prompt),
                sampling=sampling,
                key=api_key_of(request, self.api_key),
            )
            for column, history in histories.items()
        ]
        answers = [Answer(model=question.model) for question in questions]
        columns = dict(zip(histories, answers, strict=True))

        def drawn() -> Updates:
            return {
                self.view.chatbots[i]: [*histories[i], talk.answer_message(answer)]
                for i, answer in columns.items()
            }

        yield {**drawn(), **self._busy(**box)}
        session, stop = request.session_hash or "", asyncio.Event()
        self.running[session] = stop
        try:
            async with aclosing(answer_together(self.client, questions, answers, stop)) as states:
                async for _ in states:
                    yield drawn()
        finally:
            if self.running.get(session) is stop:
                del self.running[session]
        failed = {answer.model: answer.error for answer in answers if answer.error}
        for model, reason in failed.items():
            gr.Warning(escape(str(reason)), title=escape(model), duration=6)
        wants_key = any(reason.wants_key for reason in failed.values())
        yield {**drawn(), **self._idle(), self.key_row: gr.update(visible=wants_key)}

    def _place(self, event: gr.RetryData | gr.EditData) -> tuple[int, int]:
        """Column and message that an event is about."""
        ids = [chatbot._id for chatbot in self.view.chatbots]
        return ids.index(cast(gr.Chatbot, event.target)._id), cast(int, event.index)

    def _histories(self, values: Values) -> list[History]:
        return [values[chatbot] or [] for chatbot in self.view.chatbots]

    def _drawn(self, histories: list[History]) -> Updates:
        return dict(zip(self.view.chatbots, histories, strict=True))

    def _busy(self, **box: Any) -> Updates:
        return {
            self.view.box: gr.update(submit_btn=False, stop_btn="Stop", **box),
            self.view.again: gr.update(interactive=False),
            self.view.undo: gr.update(interactive=False),
            self.view.clear: gr.update(interactive=False),
        }

    def _idle(self, **box: Any) -> Updates:
        return {
            self.view.box: gr.update(submit_btn="Send", stop_btn=False, **box),
            self.view.again: gr.update(interactive=True),
            self.view.undo: gr.update(interactive=True),
            self.view.clear: gr.update(interactive=True),
        }


def visitor_of(request: gr.Request, default_key: str | None) -> Visitor:
    """Who caused this event, for calls of the API beyond asking."""
    address = request.client.host if request.client else None
    return Visitor(key=api_key_of(request, default_key), address=address)


def api_key_of(request: gr.Request, default: str | None) -> str | None:
    """The key that the visitor's browser sent with this event, else the page's own."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" and key else default
