"""transformers with bitsandbytes: its part of bench/cpu.py, on the NF4 folder that Herd serves.

Run      python -m bench.cpu_transformers FOLDER --threads N    (bench/cpu.py does); prints JSON
Method   model.forward with its own cache, without sampling. peft for the adapter.
Kernels  bitsandbytes' own for AVX512-BF16. Those that it fetches from a model hub, with the package
         `kernels`, are not used: that package cannot be imported beside our folder of its name.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from bench.cpu_load import best, memory_row, resident_bytes, speed_row


@torch.inference_mode()
def decode_s(model: Any, batch: int, num_steps: int, prompt_len: int = 32) -> float:
    """Seconds of num_steps forward passes of one token for each of `batch` sequences."""
    ids = torch.randint(3, 32_000, (batch, prompt_len))
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, :1]
    started = time.perf_counter()
    for _ in range(num_steps):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return time.perf_counter() - started


@torch.inference_mode()
def prefill_s(model: Any, num_tokens: int) -> float:
    """Seconds for a prompt of num_tokens."""
    ids = torch.randint(3, 32_000, (1, num_tokens))
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 512, 2048])
    parser.add_argument("--adapters", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--patience", type=float, default=15, help="seconds for a row at most")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    before_bytes, started = resident_bytes(), time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder / "nf4", dtype=torch.bfloat16
    ).eval()
    load_s = time.perf_counter() - started
    decode_s(model, 1, 1)  # until then weights are mapped, not read
    rows: list[dict[str, Any]] = [
        {
            "kind": "memory",
            "resident_before_bytes": before_bytes,
            **memory_row(),
            "load_s": round(load_s, 2),
        }
    ]
    for num_adapters in [number for number in options.adapters if number < 2]:
        if num_adapters:
            model = PeftModel.from_pretrained(model, options.folder / "adapter-0").eval()
            decode_s(model, 1, 1)
        for batch in options.batches:
            row = best(
                functools.partial(decode_s, model, batch, options.steps),
                options.repeats,
                options.patience,
            )
            num_tokens = batch * options.steps
            rows.append(speed_row("decode", batch, num_adapters, num_tokens, row))
        for num_tokens in options.prompts:
            row = best(
                functools.partial(prefill_s, model, num_tokens), options.repeats, options.patience
            )
            rows.append(speed_row("prefill", num_tokens, num_adapters, num_tokens, row))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
