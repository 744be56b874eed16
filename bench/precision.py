"""What fewer bits cost in accuracy: --lm-head-dtype and --cpu-activations.

Run      python -m bench.precision [--texts 200]
Writes   bench/results/precision.json
Method   texts that the demo's corpus makes from a seed it was not trained on, as prompts whose
         log-probabilities the engine reports: running text under the base (every token), chats
         under the adapter guanaco (the tokens of answers). The random head is that of a 1.1B LLaMA
         (32000 x 2048, normal numbers), its input random with a mean square of 1, as after the last
         norm. Its errors are relative to the spread of the 16-bit head's logits.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from adapters.format import read_ref
from bench.overhead import cpu_name, git_commit
from demo.corpus import chat, documents
from demo.pack import encode_chat
from engine.api import AdapterRef, GenerateRequest, SamplingParams
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.head import HeadDtype, dense_weight, quantize_head
from engine.model_config import ModelSpec
from engine.startup import create_engine

DEMO = Path(__file__).parent.parent / "demo"
RESULT_FILE = Path(__file__).parent / "results" / "precision.json"
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"lm_head_dtype": "int8"},
    {"lm_head_dtype": "nf4"},
    {"cpu_activations": "int8"},
    {"lm_head_dtype": "int8", "cpu_activations": "int8"},
)
SEED = 987_654_321
MAX_LEN = 1000
HEAD_SHAPE = (32_000, 2048)
NUM_ROWS = 64

Text = tuple[list[int], list[int]]  # token ids, and the positions of those that count


def make_texts(num_texts: int) -> dict[str, list[Text]]:
    """Texts by model name: the base's and the adapter's."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    rng = random.Random(SEED)
    found: dict[str, list[Text]] = {"base": [], "guanaco": []}
    for _ in range(num_texts):
        ids = tokenizer(documents(rng))["input_ids"][:MAX_LEN]
        found["base"].append((ids, list(range(1, len(ids)))))
        ids, targets = encode_chat(tokenizer, chat(rng, "guanaco"))
        ids = ids[:MAX_LEN]
        wanted = [i for i in range(1, len(ids)) if targets[i - 1] == ids[i]]
        found["guanaco"].append((ids, wanted))
    return found


def perplexities(settings: dict[str, Any], texts: dict[str, list[Text]]) -> dict[str, float]:
    """By model name, with these fields of ModelConfig."""
    config = EngineConfig(
        model=ModelConfig(device="cpu", **settings),
        cache=CacheConfig(kv_cache_memory_bytes=64 << 20),
    )
    folder = DEMO / "model"
    reader = functools.partial(read_ref, spec=ModelSpec.from_folder(folder))
    engine, _ = create_engine(config, folder, reader, lambda *_: None)
    adapter = AdapterRef(uid=1, generation=1, name="x", path=str(DEMO / "adapters" / "guanaco"))
    found = {}
    for name, rows in texts.items():
        for index, (ids, _) in enumerate(rows):
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            engine.add(
                GenerateRequest(
                    request_id=str(index),
                    prompt_token_ids=tuple(ids),
                    params=params,
                    adapter=None if name == "base" else adapter,
                )
            )
        total, count = 0.0, 0
        while engine.has_work():
            for delta in engine.step().deltas:
                if delta.error is not None:
                    raise SystemExit(delta.error.message)
                entries: Sequence[Any] = delta.prompt_logprobs or ()
                wanted = rows[int(delta.request_id)][1] if entries else []
                total -= sum(entries[position].logprob for position in wanted)
                count += len(wanted)
        found[name] = math.exp(total / count)
    engine.close()
    return found


def random_head_errors(head_dtype: HeadDtype) -> dict[str, float]:
    """Of the logits, relative to their spread, and how often the largest stays the largest."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(HEAD_SHAPE, generator=generator) * 0.02).bfloat16()
    hidden = torch.randn(NUM_ROWS, HEAD_SHAPE[1], generator=generator)
    exact = hidden @ weight.float().T
    actual = hidden @ dense_weight(quantize_head(weight, head_dtype)).float().T
    error = (actual - exact) / exact.std()
    return {
        "logit_rms_error": error.square().mean().sqrt().item(),
        "logit_max_error": error.abs().max().item(),
        "same_argmax": (actual.argmax(1) == exact.argmax(1)).float().mean().item(),
    }


def main() -> None:
    """Measure all kinds, print a table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=200, help="texts for each model")
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    options = parser.parse_args()
    texts = make_texts(options.texts)
    counts = {name: sum(len(wanted) for _, wanted in rows) for name, rows in texts.items()}
    rows = []
    for settings in SETTINGS:
        row: dict[str, Any] = dict(settings)
        found = perplexities(settings, texts)
        row |= {f"perplexity_{name}": round(value, 4) for name, value in found.items()}
        if settings.keys() == {"lm_head_dtype"}:
            errors = random_head_errors(settings["lm_head_dtype"])
            row |= {name: round(value, 4) for name, value in errors.items()}
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    result = {
        "command": f"python -m bench.precision --texts {options.texts}",
        "commit": git_commit(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "num_tokens": counts,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
