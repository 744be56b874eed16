"""Conversations on the page: one tab's components, and what their events do.

Public   EVENT, make_settings, make_view, wire_view
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.client import Client
from ui.handlers import Settings, Talk, View
from ui.thumbs import Thumbs

EVENT: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_limit": None,
}
"""Every event: raw values, no overlay, no API of its own, as many at once as there are visitors."""


def make_settings() -> Settings:
    with gr.Accordion("Settings for answers", elem_id="herd-settings"):
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


def make_view(*titles: str, is_first: bool = False) -> View:
    """One tab: a picker and a conversation per title, and one box to ask them all. That of the
    tab which is shown first is closed; ui/models.py opens it."""
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
                        feedback_options=["Like", "Dislike"],
                    )
                )
    better = gr.Textbox(
        label="What would have been a better answer? It is kept for training.",
        placeholder="You may leave this empty",
        visible=False,
        max_lines=12,
        submit_btn="Keep",
        elem_classes="herd-better",
    )
    box = gr.Textbox(
        label="Message",
        show_label=False,
        placeholder="Write a message",
        max_lines=8,
        submit_btn="Send",
        interactive=not is_first,
        elem_classes="herd-box",
    )
    with gr.Row(elem_classes="herd-buttons"):
        again = gr.Button("Regenerate", size="sm", min_width=80)
        undo = gr.Button("Undo", size="sm", min_width=80)
        clear = gr.Button("Clear", size="sm", min_width=80)
        winners = {}
        if len(titles) == 2:
            for name, label in (
                ("left_wins", "◀ Left is better"),
                ("right_wins", "Right is better ▶"),
            ):
                winners[name] = gr.Button(label, size="sm", min_width=120)
    return View(
        pickers=pickers,
        chatbots=chatbots,
        box=box,
        again=again,
        undo=undo,
        clear=clear,
        better=better,
        **winners,
    )


def wire_view(
    view: View, settings: Settings, *, client: Client, api_key: str | None, key_row: gr.Row
) -> None:
    """Connect one tab's components to what happens."""
    talk = Talk(client=client, api_key=api_key, view=view, settings=settings, key_row=key_row)
    outputs = [*view.chatbots, view.box, view.again, view.undo, view.clear, key_row]
    event = {
        "inputs": {view.box, *view.pickers, *view.chatbots, *settings.components},
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

    thumbs = Thumbs(client=client, api_key=api_key, view=view)
    judged = {
        "inputs": {view.better, *view.chatbots},
        "outputs": [*view.chatbots, view.better],
        **EVENT,
    }
    for chatbot in view.chatbots:
        chatbot.like(thumbs.like, **judged)
    view.better.submit(thumbs.improve, **judged)
    if view.left_wins is not None and view.right_wins is not None:
        view.left_wins.click(thumbs.prefer_left, **judged)
        view.right_wins.click(thumbs.prefer_right, **judged)
