"""The chat template that a new adapter is trained with, and served with ever after.

It is saved with the adapter (write_adapter's chat_template), so that serving cannot choose another.
A saved template writes <s> itself: an adapter's own template gets no special tokens added.
"""

from __future__ import annotations

from server.chat_template import GUANACO, GUANACO_STOPS, GUANACO_TEMPLATE, ChatTemplate

_SOURCE = "{{- bos_token }}" + GUANACO_TEMPLATE
_ANSWER = "### Assistant: {{ message.content }}"

SAVED_GUANACO = ChatTemplate(
    source=_SOURCE,
    origin="the Guanaco template",
    stops=GUANACO_STOPS,
)
"""To go on training an adapter that has always seen this format."""

WITHOUT_TEMPLATE = ChatTemplate(
    source=_SOURCE.replace(_ANSWER, _ANSWER + "{{ eos_token }}"),
    origin="the template of new adapters",
    stops=GUANACO_STOPS,
)
"""For a base that has none: Guanaco's format with the end token behind every answer, where it was
generated, so that a conversation is learnt as one sequence."""


def training_template(served: ChatTemplate | None) -> ChatTemplate:
    """The template of a training run.

    Args:
        served: what choose_template says of the model that training starts from.
    """
    if served is None:
        return WITHOUT_TEMPLATE
    return SAVED_GUANACO if served is GUANACO else served
