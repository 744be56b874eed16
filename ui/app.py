"""The chat page: Gradio Blocks that talk to the API as any other client.

Public   build_page, mount_page
Notable  a conversation lives in the browser and comes with each event, and so does the API key
         (assets/page.js); the server need remember nothing. Handlers take raw values
         (preprocess=False), because Gradio's own conversion would build whatever components
         and look up whatever files a visitor names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from ui.client import Client
from ui.handlers import Settings, Talk, View
from ui.models import Models
from ui.mount import mount_blocks

ASSETS = Path(__file__).parent / "assets"
NOT_READY_INTERVAL_S = 2.0
LOST = (
    "The connection to the server broke. Once it is back, press Stop and then Regenerate: "
    "the conversation is still here."
)
"""Shown by page.js, for then no event reaches this process."""
MAX_SESSIONS = 500
"""Page loads that Gradio keeps settings for; the page needs none of them, so the oldest may go."""

EVENT: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": None,
}
"""Every event: raw values, no overlay, no API of its own, as many at once as there are visitors."""


def mount_page(app: FastAPI, base_url: str, *, api_key: str | None = None, path: str = "/") -> None:
    """Serve the page at "/" of the API's app, before that starts; see `build_page` and ui/mount.py.

    Raises:
        ValueError: path is not "/": the page's own routes are fixed.
    """
    if path != "/":
        raise ValueError(f"path: expected '/', got {path!r}")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    mount_blocks(
        app,
        # The API is this very process; its certificate is for the name that browsers use.
        build_page(base_url, api_key, verify=False),
        favicon=ASSETS / "herd.svg",
        theme=page_theme(),
        css_paths=[ASSETS / "page.css"],
        head=f"<script>{script}</script>",
    )


def build_page(base_url: str, api_key: str | None = None, *, verify: bool = True) -> gr.Blocks:
    """The page for the API at `base_url`.

    Args:
        base_url: where this process reaches the API, such as http://127.0.0.1:8000.
        api_key: sent for every visitor who typed none. Leave it None where more people can open
            the page than may have the key: the page then asks for one as soon as the API does.
        verify: check the certificate of an https address.
    """
    client = Client(base_url, verify=verify)
    page = gr.Blocks(title="Herd", analytics_enabled=False, fill_width=True)
    page.state_session_capacity = MAX_SESSIONS
    with page:
        with gr.Row(elem_id="herd-header"):
            gr.HTML('<h1><img src="favicon.ico" alt="">Herd</h1>', padding=False)
            reload = gr.Button("↻ Adapters", size="sm", scale=0, min_width=110)
        notice = gr.HTML(elem_id="herd-notice", padding=False)
        gr.HTML(f'<span class="herd-error">{LOST}</span>', elem_id="herd-lost", padding=False)
        with gr.Row(visible=False, elem_id="herd-key") as key_row:
            key = gr.Textbox(label="API key", type="password", info="It stays in this browser tab.")
            use_key = gr.Button("Use this key", size="sm", scale=0, min_width=120)
        with gr.Row():
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Chat"):
                    chat = _view("Who answers", autofocus=True)
                with gr.Tab("Side by side"):
                    pair = _view("Left", "Right")
            with gr.Column(scale=1, min_width=250):
                settings = _settings()
        timer = gr.Timer(NOT_READY_INTERVAL_S, active=False)

        common = {"client": client, "api_key": api_key, "key_row": key_row}
        for view in (chat, pair):
            _wire(Talk(view=view, settings=settings, **common))
        pickers = [*chat.pickers, *pair.pickers]
        max_tokens = settings.sampling["max_tokens"]
        models = Models(
            pickers=pickers, notice=notice, max_tokens=max_tokens, timer=timer, **common
        )
        refresh = {
            "fn": models.refresh,
            "inputs": {*pickers, notice},  # a set, so that handlers get their values by component
            "outputs": [*pickers, notice, key_row, max_tokens, timer],
            **EVENT,
        }
        gr.on([page.load, timer.tick, reload.click], **refresh)
        # The key's own event runs in the browser alone; only its refresh reaches this process.
        gr.on([key.submit, use_key.click], None, key, None, js="herdKeepKey").then(**refresh)
    return page


def page_theme() -> gr.themes.Base:
    """Colours, and fonts that every system has: nothing is fetched."""
    return gr.themes.Default(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "Consolas", "monospace")],
    ).set(  # the default grey is too faint for small print
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400"
    )


def _settings() -> Settings:
    with gr.Accordion("Settings", elem_id="herd-settings"):
        system_prompt = gr.Textbox(
            label="System prompt", lines=3, max_lines=8, placeholder="How should the model behave?"
        )
        sampling = {
            "max_tokens": gr.Slider(1, 4096, 256, step=1, label="Max tokens"),
            "temperature": gr.Slider(
                0, 2, 0.7, step=0.05, label="Temperature", info="0: always the likeliest token"
            ),
            "top_p": gr.Slider(0.05, 1, 0.9, step=0.05, label="Top p"),
            "top_k": gr.Slider(0, 200, 0, step=1, label="Top k", info="0: no limit"),
            "min_p": gr.Slider(0, 1, 0, step=0.01, label="Min p"),
            "repetition_penalty": gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty"),
        }
        # Not a number field: that shows 0 when it is empty.
        seed = gr.Textbox(
            label="Seed", max_length=19, placeholder="empty: another answer each time"
        )
    return Settings(system_prompt=system_prompt, sampling=sampling, seed=seed)


def _view(*titles: str, autofocus: bool = False) -> View:
    """One tab: a picker and a conversation per title, and one box to ask them all."""
    pickers, chatbots = [], []
    with gr.Row(elem_classes=["herd-columns", f"herd-{len(titles)}-columns"]):
        for title in titles:
            with gr.Column(min_width=260):
                pickers.append(gr.Dropdown([], label=title, filterable=False))
                chatbots.append(
                    gr.Chatbot(
                        label=f"{title}: conversation",
                        show_label=False,
                        height=None,  # page.css fits it to the window
                        elem_classes="herd-chat",
                        editable="user",
                        buttons=["copy"],
                        placeholder="Ask something.",
                        feedback_options=None,
                    )
                )
    box = gr.Textbox(
        label="Message",
        show_label=False,
        placeholder="Write a message",
        max_lines=8,
        submit_btn="Send",
        autofocus=autofocus,
        elem_classes="herd-box",
    )
    with gr.Row(elem_classes="herd-buttons"):
        again = gr.Button("Regenerate", size="sm", min_width=80)
        undo = gr.Button("Undo", size="sm", min_width=80)
        clear = gr.Button("Clear", size="sm", min_width=80)
    return View(pickers=pickers, chatbots=chatbots, box=box, again=again, undo=undo, clear=clear)


def _wire(talk: Talk) -> None:
    """Connect one tab's components to what happens."""
    view = talk.view
    outputs = [*view.chatbots, view.box, view.again, view.undo, view.clear, talk.key_row]
    event = {
        "inputs": {view.box, *view.pickers, *view.chatbots, *talk.settings.components},
        "outputs": outputs,
        **EVENT,
    }
    view.box.submit(talk.ask, **event)
    view.again.click(talk.ask_again, **event)
    for chatbot in view.chatbots:
        chatbot.retry(talk.retry, **event)
        chatbot.edit(talk.edit, **event)
    gr.on([view.undo.click, *(chatbot.undo for chatbot in view.chatbots)], talk.undo, **event)
    view.box.stop(talk.stop, None, outputs, **EVENT)
    view.clear.click(talk.clear, None, outputs, **EVENT)
