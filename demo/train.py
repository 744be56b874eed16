"""Make the embedded demo from nothing: tokenizer, base model, 4-bit copy, four adapters, check.

Run      python -m demo.train            (about an hour on two cores; `make demo`)
         python -m demo.train --quick    (a minute: every step, a model that babbles)
Writes   demo/build (intermediate, ignored by git), demo/model, demo/adapters/{guanaco,
         pirate,reward,policy};
         with --quick all of it below demo/build/quick
Sources  QLoRA, arXiv:2305.14314: adapters are trained on the frozen base's dequantised NF4 weights.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo.check import answer_all, report
from demo.corpus import chat, documents
from demo.lora import load_frozen_base, new_adapter, save_adapter
from demo.optimise import train
from demo.pack import conversation_batches, document_batches
from demo.pretrain import new_base, quantise
from demo.reinforce import train_policy, train_reward
from demo.tokenizer import train_tokenizer

logger = logging.getLogger("demo")
DEMO = Path(__file__).parent
SEED = 20230523

BASE_TOKENS = 3_200_000
ADAPTER_TOKENS = {"guanaco": 2_400_000, "pirate": 500_000}


class Folders(NamedTuple):
    """Where everything is written."""

    base: Path
    model: Path
    adapters: Path


def make_tokenizer(folder: Path) -> None:
    """Step 1: the tokenizer, from a sample of everything that the models will read."""
    rng = random.Random(SEED)
    texts = [documents(rng) for _ in range(20_000)]
    for style in ADAPTER_TOKENS:
        # Speakers on lines of their own, or the tokenizer learns pieces across turns, like ".###".
        texts += [chat(rng, style).text.replace("###", "\n###") for _ in range(3_000)]
    train_tokenizer(texts, folder)
    logger.info("tokenizer written to %s", folder)


def make_base(folder: Path, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> None:
    """Step 2: the base model in 32 bits, trained on running text only; it never sees a chat."""
    model = new_base(len(tokenizer), SEED)
    batches = document_batches(tokenizer, documents, num_tokens, SEED)
    train(model, batches, num_tokens, learning_rate=2e-3, weight_decay=0.1, name="base")
    model.bfloat16().save_pretrained(folder)
    logger.info("base: %.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)


def make_adapter(
    folders: Folders, tokenizer: PreTrainedTokenizerBase, style: str, num_tokens: int
) -> None:
    """Step 4: one adapter on the frozen 4-bit base; the pirate starts from what guanaco knows."""
    base = load_frozen_base(folders.model)
    start = None if style == "guanaco" else folders.adapters / "guanaco"
    model = new_adapter(base, start, SEED)
    batches = conversation_batches(tokenizer, style, SEED)
    train(model, batches, num_tokens, learning_rate=1.5e-3, weight_decay=0.0, name=style)
    save_adapter(model, folders.adapters / style, style)


def main() -> None:
    """All steps, or those named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = ["tokenizer", "base", "quantise", *ADAPTER_TOKENS, "reward", "policy", "check"]
    parser.add_argument("steps", nargs="*", default=steps, help=f"some of {steps}; all by default")
    parser.add_argument("--quick", action="store_true", help="train on 1 %% of the tokens")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    unknown = set(arguments.steps) - set(steps)
    if unknown:
        parser.error(f"unknown steps {sorted(unknown)}; choose from {steps}")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    started_s = time.monotonic()
    if arguments.quick:
        quick = DEMO / "build" / "quick"
        run(arguments.steps, Folders(quick / "base", quick / "model", quick / "adapters"), 0.01)
    else:
        run(
            arguments.steps,
            Folders(DEMO / "build" / "base", DEMO / "model", DEMO / "adapters"),
            1.0,
        )
    logger.info("done in %.1f minutes", (time.monotonic() - started_s) / 60)


def run(steps: Sequence[str], folders: Folders, share: float) -> None:
    """The named steps, in their order, on this share (0..1) of the tokens."""
    if "tokenizer" in steps:
        make_tokenizer(folders.base)
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    if "base" in steps:
        make_base(folders.base, tokenizer, int(BASE_TOKENS * share))
    if "quantise" in steps:  # step 3
        quantise(folders.base, folders.model)
    for style, num_tokens in ADAPTER_TOKENS.items():
        if style in steps:
            make_adapter(folders, tokenizer, style, int(num_tokens * share))
    build = folders.base.parent
    if "reward" in steps:  # step 5
        train_reward(folders.model, folders.adapters, build, share)
    if "policy" in steps:  # step 6
        train_policy(folders.model, folders.adapters, build, share)
    if "check" in steps:  # step 7
        for style in (*ADAPTER_TOKENS, "policy"):
            report(style, answer_all(folders.model, folders.adapters / style))


if __name__ == "__main__":
    main()
