"""kill -9 in the middle of a step or of a checkpoint: the job ends with the same bits all the same.

Nothing is said here about a machine that loses power, only that a process does not get to clean up.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.api import TrainingStarted
from engine.train.checkpoint import load_checkpoint
from tests.engine.tiny_models import save_model
from tests.engine.train.training_jobs import load_base, make_job, notes, read_plain, run_job
from tests.engine.train.training_process import unfinished_name

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests" / "engine" / "train" / "training_process.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, "llama")
    return folder


def run_and_kill(base, folder, dtype, settings, at_line):
    """Start the job in a process and kill -9 it when it says a line."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(
        [sys.executable, PROGRAM, str(base), str(folder), dtype, json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == at_line:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"it never said {at_line!r}"


@pytest.mark.parametrize(("dtype", "optimizer", "at_line"), [
    ("float32", "adamw", "step 5"),
    ("bfloat16", "adamw_8bit", "writing .checkpoint-4.unfinished"),
])  # fmt: skip
def test_a_killed_job_ends_with_the_same_bits(tmp_path, base, dtype, optimizer, at_line):
    settings = {"optimizer": optimizer, "validation": True, "lr_schedule": "cosine"}
    model = load_base(base, base.parent / "cache", dtype)
    run_job(make_job(tmp_path / "whole", **settings), model)
    folder = tmp_path / "killed"
    run_and_kill(base, folder, dtype, settings, at_line)
    if at_line.startswith("writing"):
        assert (folder / unfinished_name(folder, 4)).exists()
    events = run_job(make_job(folder, **settings), model)
    assert isinstance(events[0], TrainingStarted)
    assert events[0].step == (4 if at_line.startswith("step") else 2)
    assert "Going on from" in notes(events)
    whole, killed = (read_plain(tmp_path / name / "final") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    state, tensors = load_checkpoint(folder / "checkpoint-6")
    expected_state, expected = load_checkpoint(tmp_path / "whole" / "checkpoint-6")
    assert (state.best_step, state.best_value) == (
        expected_state.best_step,
        expected_state.best_value,
    )
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    moments = tensors["optimizer.layers.0.exp_avg"]
    assert moments.dtype == (torch.uint8 if optimizer == "adamw_8bit" else torch.float32)
