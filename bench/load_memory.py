"""Peak host memory while a model loads, against the promise: its weights and the largest tensor;
and what stays, against its weights.

Run      python -m bench.load_memory            with a random 16-bit LLaMA of half a gigabyte
         python -m bench.load_memory FOLDER     with a 16-bit model folder
Writes   bench/results/load_memory.json
Method   each case in a process of its own; the peak is the kernel's high-water mark of resident
         memory, reset after the imports, less what was resident then. What was there before and
         what has come to stay is told by kind: bench/cpu_load.py's memory_row. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.cpu_load import memory_row
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.model_config import ModelSpec
from engine.quantize import quantize_checkpoint
from engine.shard_writer import ShardWriter
from engine.weights import load_model
from kernels.linear import linear

RESULT_FILE = Path(__file__).parent / "results" / "load_memory.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 16000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def make_model(folder: Path) -> None:
    """A random model in three files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder, max_shard_bytes=200_000_000)
    for name, shape in ModelSpec.from_folder(folder).tensor_shapes().items():
        writer.add({name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()})
    writer.finish()


def peak_bytes() -> int:
    """The most that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def measure(case: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Run one case here and report its peak above what the process had before."""
    torch.set_num_threads(1)
    # What torch and the kernels allocate once, when they are first called.
    linear(torch.randn(64, 64), torch.randn(64, 64)).sum()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, started = memory_row(), time.perf_counter()
    kept: dict[str, Any] = {}
    with Checkpoint(folder) as checkpoint:
        largest = max(info.num_bytes for info in checkpoint.tensors.values())
    if case == "quantize_checkpoint":
        quantize_checkpoint(folder, cache / "quantized")
        promised = 2 * largest  # a tensor and what quantising it takes; the rest is on the disk
    else:
        quantization = "none" if case == "none" else "nf4"
        config = ModelConfig(
            base="x", quantization=quantization, quantized_cache_dir=str(cache / "copies")
        )
        loaded = load_model(config, folder, "cpu")
        promised = loaded.weights_bytes + largest
    seconds = time.perf_counter() - started
    peak = peak_bytes() - before["resident_bytes"]
    if case != "quantize_checkpoint":
        after = memory_row()
        kept = {"weights_bytes": loaded.weights_bytes, "before": before}
        kept["kept"] = {name: after[name] - before[name] for name in after}
    return {
        "case": case,
        "peak_bytes": peak,
        "promised_bytes": promised,
        "largest_tensor_bytes": largest,
        "peak_over_promise": round(peak / promised, 3),
        **kept,
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a 16-bit model folder")
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if arguments.folder is None:
            make_model(folder)
        results = []
        # The first load quantises and keeps the copy that the second one finds.
        for case in ("nf4, from 16-bit", "nf4, from its copy", "none", "quantize_checkpoint"):
            with context.Pool(1) as pool:
                result = pool.apply(measure, (case, folder, Path(scratch)))
            results.append(result)
            print(
                f"{case:24} peak {result['peak_bytes'] / 1e6:8.1f} MB, "
                f"promised {result['promised_bytes'] / 1e6:8.1f} MB, "
                f"ratio {result['peak_over_promise']:.2f}, {result['seconds']:.1f} s"
            )
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    report = {
        "command": "python -m bench.load_memory",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "torch": torch.__version__,
        "model_bytes": size,
        "results": results,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
