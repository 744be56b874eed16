"""The chat page: Gradio Blocks that talk to the API as any other client.

Public   build_page, mount_page
Notable  a conversation lives in the browser and comes with each event, and so does the API key
         (assets/page.js); the server need remember nothing. Handlers take raw values
         (preprocess=False), because Gradio's own conversion would build whatever components
         and look up whatever files a visitor names.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from ui.chat_view import EVENT, make_settings, make_view, wire_view
from ui.client import Client
from ui.models import Models
from ui.mount import mount_blocks
from ui.train_view import make_train_view, wire_training

ASSETS = Path(__file__).parent / "assets"
NOT_READY_INTERVAL_S = 2.0
LOST = (
    "The connection to the server broke. Once it is back, press Stop and then Regenerate: "
    "the conversation is still here."
)
"""Shown by page.js, for then no event reaches this process."""
MAX_SESSIONS = 500
"""Page loads that Gradio keeps settings for; the page needs none of them, so the oldest may go."""


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
                with gr.Tab("Chat") as chat_tab:
                    chat = make_view("Who answers", is_first=True)
                with gr.Tab("Side by side") as pair_tab:
                    pair = make_view("Left", "Right")
                with gr.Tab("Train") as train_tab:
                    train = make_train_view()
            with gr.Column(scale=1, min_width=250):
                settings = make_settings()
        timer = gr.Timer(NOT_READY_INTERVAL_S, active=False)

        common = {"client": client, "api_key": api_key, "key_row": key_row}
        for view in (chat, pair):
            wire_view(view, settings, **common)
        opening = wire_training(train, settings, tab=train_tab, **common)
        pickers = [*chat.pickers, *pair.pickers]
        max_tokens = settings.sampling["max_tokens"]
        models = Models(
            pickers=pickers,
            box=chat.box,
            notice=notice,
            max_tokens=max_tokens,
            timer=timer,
            **common,
        )
        refresh = {
            "fn": models.refresh,
            "inputs": {*pickers, notice},  # a set, so that handlers get their values by component
            "outputs": [*pickers, chat.box, notice, key_row, max_tokens, timer],
            **EVENT,
        }
        # What has been trained meanwhile can be picked.
        returns = [chat_tab.select, pair_tab.select]
        gr.on([page.load, timer.tick, reload.click, *returns], **refresh)
        # The key's own event runs in the browser alone; only its refresh reaches this process.
        keep_key = gr.on([key.submit, use_key.click], None, key, None, js="herdKeepKey")
        keep_key.then(**refresh).then(**opening)
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
