"""The chat template that a new adapter is trained with, and served with ever after.

It is saved with the adapter (write_adapter's chat_template), so that serving cannot choose another.
"""

from __future__ import annotations

from server.chat_template import GUANACO, GUANACO_STOPS, GUANACO_TEMPLATE, ChatTemplate

WITHOUT_TEMPLATE = ChatTemplate(
    source="{{- bos_token }}" + GUANACO_TEMPLATE,
    origin="the Guanaco template",
    stops=GUANACO_STOPS,
)
"""Guanaco's, with <s> in its text: an adapter's own template gets no special tokens added."""


def training_template(served: ChatTemplate | None) -> ChatTemplate:
    """The template of a training run.

    Args:
        served: what choose_template says of the model that training starts from.
    """
    return WITHOUT_TEMPLATE if served is None or served is GUANACO else served
