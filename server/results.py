"""The results file of a job: one CSV line per step, OpenAI's columns first."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

FIRST_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
RENAMED = {"train_mean_token_accuracy": "train_accuracy"}
LEFT_OUT = ("total_steps",)


def results_csv(metrics: Iterable[Mapping[str, Any]]) -> bytes:
    """Metrics of each step, in order; a step that comes twice counts as it came last."""
    by_step: dict[int, dict[str, Any]] = {}
    columns = dict.fromkeys(FIRST_COLUMNS)
    for data in metrics:
        row = {RENAMED.get(k, k): value for k, value in data.items() if k not in LEFT_OUT}
        columns.update(dict.fromkeys(row))
        by_step.setdefault(int(row["step"]), {}).update(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_step[step] for step in sorted(by_step))
    return text.getvalue().encode()
