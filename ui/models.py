"""Which models the page offers and what it says about the server, at each load and on demand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from ui.api_types import ApiError, ModelCard
from ui.client import Client
from ui.handlers import Updates, Values, api_key_of

WANTS_KEY = "This server asks for an API key."
WAITING = '<span class="herd-waiting">{} This page goes on as soon as the server is ready.</span>'
TOY = (
    "<b>This is the demo model, a toy</b> that learnt from a small corpus, so that everything can "
    "be tried without a download. It is often wrong."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which names can be asked, for the pickers of all tabs."""

    client: Client
    api_key: str | None
    pickers: Sequence[gr.Dropdown]
    box: gr.Textbox
    """For messages, in the tab that is shown first: closed until there is a model to ask, because
    what is sent before is refused. It gets the focus when it opens."""
    notice: gr.HTML
    key_row: gr.Row
    max_tokens: gr.Slider
    timer: gr.Timer

    async def refresh(self, values: Values, request: gr.Request) -> Updates:
        """Ask the API for its models and its health; keep what was picked where it still exists."""
        # Adapters are loaded after the engine is ready: a page that waited looks once more.
        has_waited = "herd-waiting" in (values[self.notice] or "")
        key = api_key_of(request, self.api_key)
        try:
            reason = await self.client.why_not_ready()
            cards = [card for card in await self.client.models(key) if not card.scores]
        except ApiError as error:
            text = WANTS_KEY if error.wants_key and not key else escape(str(error))
            return {
                self.notice: text if error.wants_key else WAITING.format(text),
                self.key_row: gr.update(visible=error.wants_key),
                self.timer: gr.update(active=not error.wants_key),
            }
        choices = [(card.title, card.name) for card in cards]
        names = [name for _, name in choices]
        defaults = first_picks(cards, len(self.pickers))
        updates: Updates = {
            picker: gr.update(
                choices=choices,
                value=values[picker] if values[picker] in names and not has_waited else default,
            )
            for picker, default in zip(self.pickers, defaults, strict=True)
        }
        if names:
            updates[self.box] = gr.update(interactive=True, autofocus=True)
        if max_model_len := max((card.max_model_len or 0 for card in cards), default=0):
            updates[self.max_tokens] = gr.update(maximum=max_model_len)
        is_demo = any(is_demo_name(card.name) for card in cards if card.parent is None)
        waiting = WAITING.format(escape(reason)) if reason else None
        updates[self.notice] = waiting or (TOY if is_demo else "")
        updates[self.key_row] = gr.update(visible=False)
        updates[self.timer] = gr.update(active=bool(waiting) or has_waited)
        return updates


def first_picks(cards: Sequence[ModelCard], count: int) -> list[str | None]:
    """What the pickers show at first: adapters, for the base may only continue text."""
    names = [card.name for card in cards if card.parent] + [
        card.name for card in cards if not card.parent
    ]
    # The first two pickers (chat, left) agree, the third (right) shows another model.
    return [names[max(0, i - 1) % len(names)] if names else None for i in range(count)]


def is_demo_name(name: str) -> bool:
    """Whether the base model is the embedded demo."""
    return "demo" in re.split(r"[^a-z]+", name.lower())
