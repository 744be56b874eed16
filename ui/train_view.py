"""The Train tab: its components, and what their events do.

Public   make_train_view, wire_training
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.chat_view import EVENT, make_view, wire_view
from ui.client import Client
from ui.handlers import Settings
from ui.training import Training, TrainView
from ui.training_api import Runs
from ui.training_form import make_form

WATCH_INTERVAL_S = 2.0


def make_train_view() -> TrainView:
    """The tab's components."""
    with gr.Row():
        with gr.Column(min_width=300):
            form = make_form()
        with gr.Column(min_width=300):
            run = gr.Dropdown([], label="Run", filterable=False)
            status = gr.HTML(elem_id="herd-status")
            with gr.Row(elem_classes="herd-buttons"):
                pause = gr.Button("Pause", size="sm", min_width=80, visible=False)
                resume = gr.Button("Resume", size="sm", min_width=80, visible=False)
                cancel = gr.Button("Cancel", size="sm", min_width=80, visible=False)
            charts = gr.HTML(elem_id="herd-charts")
    with gr.Column(visible=False, elem_id="herd-comparison") as comparison:
        place = gr.HTML(padding=False)
        with gr.Row(elem_classes="herd-buttons"):
            put_in_place = gr.Button("Use it", size="sm", min_width=120, variant="primary")
            roll_back = gr.Button("Roll back", size="sm", min_width=120)
        talk = make_view("Before", "After")
    return TrainView(
        form=form,
        run=run,
        status=status,
        pause=pause,
        resume=resume,
        cancel=cancel,
        charts=charts,
        comparison=comparison,
        place=place,
        talk=talk,
        put_in_place=put_in_place,
        roll_back=roll_back,
        timer=gr.Timer(WATCH_INTERVAL_S, active=False),
    )


def wire_training(
    view: TrainView,
    settings: Settings,
    *,
    client: Client,
    api_key: str | None,
    key_row: gr.Row,
    tab: gr.Tab,
) -> dict[str, Any]:
    """Connect the tab's components; gives the event that reads everything anew."""
    common: dict[str, Any] = {"client": client, "api_key": api_key, "key_row": key_row}
    training = Training(view=view, runs=Runs(client), **common)
    wire_view(view.talk, settings, **common)
    form = view.form
    chosen = {*form.fields, view.run, *view.talk.pickers}
    opening: dict[str, Any] = {
        "fn": training.open,
        "inputs": chosen,
        "outputs": [*form.fields, *view.watched, key_row],
        **EVENT,
    }
    watching: dict[str, Any] = {"inputs": chosen, "outputs": [*view.watched, key_row], **EVENT}
    tab.select(**opening)
    form.start.click(training.start, **watching)
    gr.on([view.run.input, view.timer.tick], training.watch, **watching)
    view.pause.click(training.pause, **watching)
    view.resume.click(training.resume, **watching)
    view.cancel.click(training.cancel, **watching)
    view.put_in_place.click(training.put_in_place, **watching)
    view.roll_back.click(training.roll_back, **watching)
    form.upload.click(  # the browser itself sends the file; its reply is the event's input
        training.take_upload,
        form.uploaded,
        [form.data, form.uploaded, view.status, view.timer, key_row],
        js="herdUpload",
        **EVENT,
    )
    choosing = [form.method, form.reward_adapter]
    form.data.input(form.choose_data, {form.data, form.method}, choosing, **EVENT)
    form.method.input(form.choose_method, {form.method}, choosing, **EVENT)
    return opening
