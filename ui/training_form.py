"""What a training run is made of: the form's components, and the request that they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from ui.handlers import Updates, Values

FEEDBACK = "feedback:"
"""Begins the value of a choice of data that is collected feedback, not a file."""
METHODS = {
    "supervised": (
        "Imitate good answers",
        "The data are conversations, or questions with their answers (method supervised).",
    ),
    "dpo": (
        "Prefer the better of two answers",
        "The data are pairs of a better and a worse answer (method dpo).",
    ),
    "reward": (
        "Score answers",
        "The data are such pairs, too; the result scores answers and does not chat (method "
        "reward).",
    ),
    "reinforcement": (
        "Seek a high score",
        "The data are questions; another adapter scores the answers (method reinforcement).",
    ),
}
"""By the API's name: what it does, and what it takes."""
OF_PAIRS = ("dpo", "reward")
"""Methods that learn from pairs."""
NUMBERS = {
    "n_epochs": "Passes over the data",
    "batch_size": "Samples per step",
    "learning_rate_multiplier": "Learning rate, times the default",
    "rank": "Rank of the adapter",
}
"""By the API's name of the hyperparameter."""
WHOLE_NUMBERS = ("n_epochs", "batch_size", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The components, and what depends on what among them."""

    data: gr.Dropdown
    upload: gr.Button
    uploaded: gr.Textbox
    """What the browser's upload gave back; never shown."""
    method: gr.Radio
    reward_adapter: gr.Dropdown
    start_from: gr.Dropdown
    name: gr.Textbox
    numbers: Mapping[str, gr.Textbox]
    """Empty: automatic."""
    validation: gr.Dropdown
    start: gr.Button

    @property
    def fields(self) -> list[Component]:
        """What a run is made of, as inputs of an event."""
        fields = [self.data, self.method, self.reward_adapter, self.start_from, self.name]
        return [*fields, self.validation, *self.numbers.values()]

    def choose_data(self, values: Values) -> Updates:
        """Collected feedback says by itself which method suits."""
        kind = str(values[self.data] or "").removeprefix(FEEDBACK)
        if kind == "supervised":
            return self.choose_method({self.method: kind})
        if kind == "preference" and values[self.method] not in OF_PAIRS:
            return self.choose_method({self.method: "dpo"})
        return self.choose_method(values)

    def choose_method(self, values: Values) -> Updates:
        """Say what the method takes, and ask for the adapter that it may need."""
        method = values[self.method]
        return {
            self.method: gr.update(value=method, info=METHODS[method][1]),
            self.reward_adapter: gr.update(visible=method == "reinforcement"),
        }

    def body(self, values: Values) -> dict[str, Any]:
        """The request that starts the run; its training file may be a name of feedback yet.

        Raises:
            ValueError: something is missing, or is no number.
        """
        method = values[self.method]
        if not values[self.data]:
            raise ValueError(
                "Choose what to learn from: upload a file, or give some answers in the chat thumbs "
                "up or down."
            )
        if values[self.data] == f"{FEEDBACK}preference" and method not in OF_PAIRS:
            titles = " or ".join(f"'{METHODS[name][0]}'" for name in OF_PAIRS)
            raise ValueError(f"Pairs of a better and a worse answer are for {titles}.")
        if not values[self.start_from]:
            raise ValueError("There is no model yet: wait until the server is ready.")
        chosen = {name: (values[box] or "").strip() for name, box in self.numbers.items()}
        settings: dict[str, Any] = {
            "hyperparameters": {name: _number(name, text) for name, text in chosen.items() if text}
        }
        if method == "reinforcement":
            if not values[self.reward_adapter]:
                raise ValueError(
                    "Choose the adapter that scores the answers. There is none yet? Train one "
                    f"first: {METHODS['reward'][0]}."
                )
            settings["grader"] = {"type": "score_model", "model": values[self.reward_adapter]}
        body = {
            "model": values[self.start_from],
            "training_file": values[self.data],
            "method": {"type": method, method: settings},
            "suffix": (values[self.name] or "").strip(),
            "validation_file": values[self.validation],
        }
        return {name: value for name, value in body.items() if value}


def make_form() -> Form:
    """The form's components."""
    data = gr.Dropdown(
        [],
        label="Learn from",
        filterable=False,
        info="A file of examples (JSONL), or what was collected with thumbs in the chat",
    )
    upload = gr.Button("Upload a file …", size="sm", elem_id="herd-upload")
    uploaded = gr.Textbox(visible=False)
    method = gr.Radio(
        [(title, method) for method, (title, _) in METHODS.items()],
        value="supervised",
        label="How",
        info=METHODS["supervised"][1],
    )
    reward_adapter = gr.Dropdown([], label="Scored by", filterable=False, visible=False)
    start_from = gr.Dropdown([], label="Start from", filterable=False)
    name = gr.Textbox(label="Name", max_length=64, placeholder="optional")
    with gr.Accordion("More", open=False):
        numbers = {
            number: gr.Textbox(label=label, placeholder="automatic", max_length=12)
            for number, label in NUMBERS.items()
        }
        validation = gr.Dropdown(
            [("none", "")], value="", label="Examples to check on, never learnt", filterable=False
        )
    start = gr.Button("Start training", variant="primary")
    return Form(
        data=data,
        upload=upload,
        uploaded=uploaded,
        method=method,
        reward_adapter=reward_adapter,
        start_from=start_from,
        name=name,
        numbers=numbers,
        validation=validation,
        start=start,
    )


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name in WHOLE_NUMBERS else float(text)
    except ValueError:
        what = "a whole number" if name in WHOLE_NUMBERS else "a number"
        raise ValueError(f"{NUMBERS[name]}: expected {what} or nothing, got {text!r}.") from None
