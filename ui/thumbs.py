"""What the visitor thinks of an answer: thumbs, a better answer, which of two is better.

The API keeps it with the conversation; the byline shows that it was kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, cast

import gradio as gr

from ui import conversation as talk
from ui.api_types import ApiError, Visitor
from ui.client import Client
from ui.conversation import History, Message
from ui.handlers import Updates, Values, View, visitor_of

UP, DOWN = "noted: good", "noted: bad"
CORRECTED = "noted: bad, with your better answer"
BETTER, WORSE = "noted: the better one", "noted: the worse one"
NOT_KEPT = "Only answers that a chat gave in this session of the server can be judged."


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbs:
    """The events of one tab that judge its answers."""

    client: Client
    api_key: str | None
    view: View

    async def like(self, values: Values, event: gr.LikeData, request: gr.Request) -> Updates:
        """A thumb was clicked; a second click on the same one takes it back."""
        ids = [chatbot._id for chatbot in self.view.chatbots]
        column, index = ids.index(cast(gr.Chatbot, event.target)._id), cast(int, event.index)
        history: History = values[self.view.chatbots[column]] or []
        rating, verdict = ("up", UP) if event.liked is True else ("down", DOWN)
        if talk.has_verdict(history[index], verdict):
            rating, verdict = "none", ""
        shown = await self._judge(history, index, verdict, request, rating=rating)
        updates: Updates = {self.view.chatbots[column]: shown}
        updates[self.view.better] = gr.update(visible=rating == "down", value="")
        return updates

    async def improve(self, values: Values, request: gr.Request) -> Updates:
        """The visitor wrote what would have been better than the last answer with thumbs down."""
        text = (values[self.view.better] or "").strip()
        if not text:
            return {self.view.better: gr.update(visible=False)}
        for chatbot in self.view.chatbots:
            history: History = values[chatbot] or []
            downs = [i for i, message in enumerate(history) if talk.has_verdict(message, DOWN)]
            if downs:
                shown = await self._judge(history, downs[-1], CORRECTED, request, preferred=text)
                return {chatbot: shown, self.view.better: gr.update(visible=False, value="")}
        return {self.view.better: gr.update(visible=False)}

    async def prefer_left(self, values: Values, request: gr.Request) -> Updates:
        """Of the last two answers side by side the left one is better."""
        return await self._prefer(0, values, request)

    async def prefer_right(self, values: Values, request: gr.Request) -> Updates:
        """The right one is."""
        return await self._prefer(1, values, request)

    async def _prefer(self, better: int, values: Values, request: gr.Request) -> Updates:
        histories: list[History] = [values[chatbot] or [] for chatbot in self.view.chatbots]
        asked = [talk.api_messages(history[:-1], "") for history in histories]
        if not all(histories) or asked[0] != asked[1]:
            gr.Warning(
                "Two answers can be compared where they answer the same conversation: press Clear "
                "and ask both anew."
            )
            return {chatbot: gr.skip() for chatbot in self.view.chatbots}
        worse = 1 - better
        kept: dict[str, Any] = {"preferred": talk.text_of(histories[better][-1])}
        last = len(histories[worse]) - 1
        shown = await self._judge(histories[worse], last, WORSE, request, **kept)
        updates: Updates = {self.view.chatbots[worse]: shown}
        if shown is not histories[worse]:
            winner = histories[better]
            marked = [*winner[:-1], talk.with_verdict(winner[-1], BETTER)]
            updates[self.view.chatbots[better]] = marked
        return updates

    async def _judge(
        self,
        history: History,
        index: int,
        verdict: str,
        request: gr.Request,
        **judgement: Any,
    ) -> History:
        """Send a judgement; the conversation with the verdict shown, or as it was."""
        visitor = visitor_of(request, self.api_key)
        try:
            message = history[index]
            await send(self.client, visitor, message, **judgement)
        except ApiError as error:
            gr.Warning(escape(str(error)))
            return history
        return [*history[:index], talk.with_verdict(message, verdict), *history[index + 1 :]]


async def send(client: Client, visitor: Visitor, message: Message, **judgement: Any) -> None:
    """Let the API keep what the visitor thinks of an answer.

    Raises:
        ApiError: it cannot be judged, or the API refuses.
    """
    response_id = talk.response_id_of(message)
    if response_id is None:
        raise ApiError(NOT_KEPT)
    await client.call(
        "POST", "/v1/feedback", visitor, body={"response_id": response_id, **judgement}
    )
