"""docs/training-data.md says what server/datasets does."""

import json
import re

import pytest

from engine.train.token_dataset import METHOD_KIND
from server.datasets.formats import FORMATS, recognise
from tests.server.datasets.served_models import ROOT

PAGE = (ROOT / "docs" / "training-data.md").read_text(encoding="utf-8")
ROWS = {
    line.split("|")[1].split(" (")[0].strip(): line.split("|")[2:-1]
    for line in PAGE.splitlines()
    if line.startswith("| ")
}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_format_has_its_row(form):
    needs, may_have, _, methods = ROWS[form.name]
    assert all(f"`{name}`" in needs for name in form.needs)
    told = set(re.findall(r"`(\w+)`", may_have))
    silent = {"parallel_tool_calls", "label"}  # without an effect on tokens; refused
    inside = {"weight", "tools", *form.needs}  # messages, "input" and turns have them
    assert set(form.may_have) - silent <= told <= {*form.may_have, *inside}
    expected = {name for name, kind in METHOD_KIND.items() if kind == form.kind}
    assert set(methods.strip().split(", ")) == expected


def test_the_page_names_no_other_formats():
    assert ROWS.keys() - {"format"} == {form.name for form in FORMATS}


def test_the_examples_are_recognised():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    chat, preference = map(json.loads, block.splitlines())
    assert recognise(chat, "supervised").name == "chat"
    assert recognise(preference, "preference").name == "openai-preference"
