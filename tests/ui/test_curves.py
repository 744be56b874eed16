"""Curves as SVG, and a run in words."""

import math

import pytest

from ui.curves import MAX_POINTS, Series, chart, nice_ticks, thinned
from ui.run_report import charts_html, status_html
from ui.training_api import History, Job


def job(**fields):
    fields = {"id": "ftjob-1", "status": "running", "is_paused": False, "result": None} | fields
    return Job(model="base", method="supervised", created_at=1, **fields)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.5, 1]),
        ([1.2, 2.9], [1, 1.5, 2, 2.5, 3]),
        ([-3.0, 5.0], [-4, -2, 0, 2, 4, 6]),
        ([0.003, 0.0049], [0.003, 0.0035, 0.004, 0.0045, 0.005]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values, ticks):
    assert nice_ticks(values) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 1e9, 1e-9])
def test_a_single_value_has_two_ticks_around_it(value):
    ticks = nice_ticks([value])
    assert len(ticks) >= 2
    assert ticks[0] <= value <= ticks[-1]
    assert "NaN" not in chart("Loss", [Series("training", [(1, value)])])


def test_a_chart_draws_each_curve_once_and_says_where_it_stands():
    picture = chart("Loss", [Series("training", [(1, 3.0), (2, 1.5)]), Series("validation", [])])
    assert picture.count('class="curve"') == 1
    assert 'aria-label="Loss: training 1.5 at step 2"' in picture


def test_what_is_not_finite_is_left_out():
    assert chart("Loss", [Series("training", [(1, math.nan), (2, math.inf)])]) == ""
    picture = chart("Loss", [Series("training", [(1, 1.0), (2, math.nan), (3, 2.0)])])
    assert "nan" not in picture
    assert chart("Loss", []) == ""


def test_names_cannot_bring_markup_into_the_page():
    assert "<b>x" not in chart("<b>x", [Series("<b>x", [(1, 1.0)])]).replace("<b>1", "")


def test_long_curves_are_averaged_and_keep_their_end():
    points = [(float(step), float(step % 2)) for step in range(10_001)]
    short = thinned(points)
    assert len(short) <= MAX_POINTS + 1
    assert short[-1] == points[-1]
    assert all(0.4 < value < 0.6 for _, value in short[:-1])


def test_the_most_telling_curves_are_drawn():
    metrics = {"train_loss": 1.0, "valid_loss": 2.0, "kl": 0.1, "learning_rate": 1e-4}
    html = charts_html(History(metrics={1: metrics, 2: metrics | {"reward": 3.0}}))
    assert html.count("<svg") == 3
    assert "Loss: training 1, validation 2 at step 2" in html
    assert "Reward: training 3 at step 2" in html
    assert "learning" not in html


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"status": "validating_files"}, "Checking the data"),
        ({"status": "queued"}, "Waiting"),
        ({"status": "queued", "is_paused": True, "step": 3, "num_steps": 9}, "at step 3 of 9"),
        ({"status": "running", "step": 3, "num_steps": 9}, "step 3 of 9 · 50 tokens/s"),
        ({"status": "succeeded", "result": "ft:x"}, "under the name <b>ft:x</b>"),
        ({"status": "failed", "error": "<no>"}, "&lt;no&gt;"),
        ({"status": "cancelled", "step": 3}, "at step 3"),
    ],
)
def test_every_state_is_said_in_words(fields, words):
    history = History(metrics={1: {"tokens_per_s": 50.0}}, notes=["one", "<two>"])
    html = status_html(job(**fields), history)
    assert words in html
    assert "&lt;two&gt;" in html
