"""The whole engine with the Triton kernels, run by Triton's interpreter on the CPU.

In a process of its own: the interpreter must be asked for before anything imports Triton, and the
other tests' engines must not find these kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys, tempfile
from dataclasses import replace
from pathlib import Path
import torch
from kernels import dispatch
from kernels.gpu import register
from tests.engine.test_equivalence import make_engine, request, run, texts
from tests.engine.tiny_models import save_model

torch.set_num_threads(1)
FLAGS = {"max_num_batched_tokens": 14, "max_num_seqs": 6}
CASES = {
    "llama": {}, "mistral_window": {}, "qwen3": {"kv_cache_dtype": "fp8", "block_size": 16},
}
REQUESTS = [
    request(0, 2), request(1, 3),
    request(7, 2, temperature=0.9, top_p=0.8, top_k=20, min_p=0.01, seed=7),
    request(4, 2, temperature=0.7, seed=8, repetition_penalty=1.3, frequency_penalty=0.4),
]

def generate():
    found = {}
    for name, flags in CASES.items():
        folder = Path(root) / name
        if not folder.exists():
            save_model(folder, name)
        found[name] = texts(run(make_engine(folder, **FLAGS, **flags), REQUESTS))
    return found

def counted(operation, implementation):
    def run(*arguments):
        used.add(operation)
        return implementation.run(*arguments)
    return replace(implementation, run=run)

used = set()
with tempfile.TemporaryDirectory() as root:
    expected = generate()
    for operation, implementation, _ in register._candidates():
        dispatch.register(operation, counted(operation, implementation))
    actual = generate()
print(json.dumps({"expected": expected, "actual": actual, "used": sorted(used)}))
"""


def test_the_kernels_say_what_the_references_say():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HERD_NATIVE_ISA": "none"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["actual"] == found["expected"]
    assert len(found["actual"]) == 3
    assert set(found["used"]) >= {
        "add_rms_norm", "paged_attention", "paged_attention_fp8", "rms_norm", "rotate_and_cache",
        "silu_and_mul", "choose_tokens",
    }  # fmt: skip
