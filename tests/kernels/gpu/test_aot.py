"""The kernels are compiled for GPUs that are not here, and the code is held to budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SUPPORTED = ("3.6.", "3.7.")
pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(SUPPORTED), reason="budgets are for Triton 3.6 and 3.7"
)

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What bench.aot counted, in a process of its own, without the interpreter."""
    path = tmp_path_factory.mktemp("aot") / "counts.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--output", path],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert path.exists(), done.stderr
    return json.loads(path.read_text())


def test_no_kernel_is_over_its_budget(report):
    assert report["problems"] == []


def test_every_architecture_is_compiled_for(report):
    assert {counts["arch"] for counts in report["counts"]} == {75, 80, 86, 89, 90, 100, 120}


def test_every_budget_is_for_a_kernel_that_is_counted(report):
    kernels = {counts["kernel"] for counts in report["counts"]}
    on_one = {f"{counts['kernel']} on sm_{counts['arch']}" for counts in report["counts"]}
    assert json.loads((ROOT / "bench" / "aot_budgets.json").read_text()).keys() <= kernels | on_one


def test_decoding_assembly_sees_four_neighbouring_bytes_of_a_row(report):
    decoding = [c for c in report["counts"] if c["kernel"].startswith("decode")]
    assert len(decoding) >= 16
    assert {counts["arch"] for counts in decoding} == {80, 86, 89, 90, 100, 120}
    for counts in decoding:
        assert "opIdx = 0" in counts["operand"]
        assert "kWidth = 4" in counts["operand"]
