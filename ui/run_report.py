"""A training run as HTML: one line of words, a bar, its last messages, its curves.

Public   status_html, charts_html, error_html
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape

from ui.curves import Series, chart
from ui.training_api import History, Job

NUM_NOTES = 4
MAX_CHARTS = 3
SPLITS = (("train_", "training"), ("", "training"), ("valid_", "validation"))
"""How a metric's name begins, and of what data it is."""
NAMES = {
    "loss": "Loss",
    "reward": "Reward",
    "mean_token_accuracy": "Tokens guessed right",
    "accuracy": "Pairs in the right order",
    "rewards/accuracies": "Pairs in the right order",
    "margin": "Margin between the two",
    "rewards/margins": "Margin between the two",
    "kl": "Distance from the reference (KL)",
}
"""Curves by the metric's name, in the order of interest; the first ones found are drawn."""
INTRODUCTION = (
    "Nothing has been trained yet. Choose on the left what to learn from and press <b>Start "
    "training</b>: chatting goes on meanwhile, and here you see how it is getting on."
)


def status_html(job: Job | None, history: History | None) -> str:
    """How a run stands."""
    if job is None or history is None:
        return f'<p class="herd-run">{INTRODUCTION}</p>'
    if job.status == "failed":
        reason = job.error or "The run failed."
        return error_html(reason) + _notes([note for note in history.notes if note not in reason])
    share = 100 if job.status == "succeeded" else 0
    if job.num_steps and job.status != "succeeded":
        share = min(round(100 * job.step / job.num_steps), 100)
    bar = f'<div class="herd-bar"><div style="width:{share}%"></div></div>'
    return f'<p class="herd-run">{_words(job, history)}</p>{bar}{_notes(history.notes)}'


def error_html(message: str) -> str:
    """What went wrong, as elsewhere on the page; lists of problems keep their lines."""
    return f'<span class="herd-error">{escape(message)}</span>'


def charts_html(history: History) -> str:
    """The most telling curves of a run."""
    charts = []
    for name, title in NAMES.items():
        series = [Series(label, points) for label, points in _curves(history, name)]
        if picture := chart(title, series):
            charts.append(picture)
    return f'<div class="herd-charts">{"".join(charts[:MAX_CHARTS])}</div>'


def _curves(history: History, name: str) -> Iterable[tuple[str, list[tuple[float, float]]]]:
    found: dict[str, dict[float, float]] = {}
    for prefix, label in SPLITS:
        for step, values in sorted(history.metrics.items()):
            if prefix + name in values:
                found.setdefault(label, {})[step] = values[prefix + name]
    return [(label, list(points.items())) for label, points in found.items()]


def _words(job: Job, history: History) -> str:
    steps = f"step {job.step} of {job.num_steps}" if job.num_steps else f"step {job.step}"
    if job.is_paused:
        return f"<b>Paused</b> at {steps}. It goes on from there when you press Resume."
    if job.status == "succeeded":
        what = "scores answers" if job.method == "reward" else "answers"
        return f"<b>Done.</b> It {what} under the name <b>{escape(str(job.result))}</b>."
    if job.status == "running":
        words = [f"<b>Training</b>: {steps}"]
        if job.finish_at is not None:
            words.append(f"{_duration(job.finish_at - time.time())} left")
        last = history.metrics[max(history.metrics)] if history.metrics else {}
        if speed := last.get("tokens_per_s"):
            words.append(f"{speed:,.0f} tokens/s")
        return " · ".join(words)
    return {
        "validating_files": "<b>Checking the data</b> …",
        "queued": "<b>Waiting</b> for its turn …",
        "cancelled": f"<b>Cancelled</b> at {steps}.",
    }.get(job.status, escape(job.status))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(round(seconds), 1)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _notes(notes: list[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes[-NUM_NOTES:])
    return f'<ul class="herd-notes">{lines}</ul>' if lines else ""
