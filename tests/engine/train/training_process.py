"""A training job in a process of its own, to be killed. Not a test module.

Prints a line for each step done and one when a checkpoint is half written, and then waits a moment,
so that whoever reads the lines can strike there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from engine.api import TrainingProgress
from engine.train.checkpoint import checkpoint_path
from tests.engine.train.training_jobs import load_base, make_job, make_trainer, write_plain

PAUSE_S = 0.2
"""Long enough for a signal, short for a test."""


def main(base: str, job_folder: str, dtype: str, settings: str) -> None:
    def write(path, weights, config):
        write_plain(path, weights, config)
        say(f"writing {path.name}")

    base_folder = Path(base)
    model = load_base(base_folder, base_folder.parent / "cache", dtype)
    job = make_job(Path(job_folder), **json.loads(settings))
    for event in make_trainer(job, model, write_adapter=write).run():
        if isinstance(event, TrainingProgress):
            say(f"step {event.step}")
    say("done")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    time.sleep(PAUSE_S)


def unfinished_name(folder: Path, step: int) -> str:
    """What a checkpoint is called while it is being written."""
    return f".{checkpoint_path(folder, step).name}.unfinished"


if __name__ == "__main__":
    main(*sys.argv[1:])
