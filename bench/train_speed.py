"""Training steps per second on a CPU, one system in a process of its own; bench/train.py runs it.

Run      python -m bench.train_speed FOLDER --system herd|peft|peft-checkpointing ...; prints JSON
Step     gradients of one batch of full sequences, clipping to a norm of 0.3, AdamW on the adapter
Systems  herd: the serving tensors, as a training job runs them. peft: transformers, peft and
         bitsandbytes, 4-bit with double quantisation, PyTorch's AdamW, autocast in bfloat16; all
         activations kept, its fastest way. peft-checkpointing: the same with gradient checkpointing
         after prepare_model_for_kbit_training, as QLoRA's recipe has it.
Seconds  of wall, and of processor time, which other processes on the machine disturb least; the
         best of all steps of each.
"""

from __future__ import annotations

import bench.as_served  # noqa: F401  isort: skip

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cpu_load import busy_s, resident_bytes

VOCAB_SIZE = 32_000
NUM_WARM_UPS = 2
MAX_GRAD_NORM = 0.3
LEARNING_RATE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with dense/ and nf4/, bench/cpu_models.py's")
    parser.add_argument("--system", choices=sorted(SYSTEMS), required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    input_ids = torch.randint(3, VOCAB_SIZE, (options.sequences, options.length))
    step = SYSTEMS[options.system](options, input_ids)
    for _ in range(NUM_WARM_UPS):
        step()
    walls, cpus, others = [], [], []
    for _ in range(options.steps):
        busy, cpu, started = busy_s(), time.process_time(), time.perf_counter()
        step()
        walls.append(time.perf_counter() - started)
        cpus.append(time.process_time() - cpu)
        others.append(max(0.0, (busy_s() - busy - cpus[-1]) / walls[-1]))
    row = {
        "seconds": round(min(walls), 4),
        "cpu_seconds": round(min(cpus), 4),
        "tokens_per_s": round(input_ids.numel() / min(walls), 1),
        "others_cpus": round(sorted(others)[len(others) // 2], 2),
        "resident_bytes": resident_bytes(),
    }
    print(json.dumps(row))


def prepare_herd(options: argparse.Namespace, input_ids: torch.Tensor) -> Callable[[], None]:
    """One step of ours."""
    from engine.config import ModelConfig
    from engine.train.adapter import TrainableAdapter
    from engine.train.batch import make_batch
    from engine.train.config import TrainConfig
    from engine.train.forward_backward import forward_backward
    from engine.train.noise import noise_seed
    from engine.train.objectives import denominator_of, make_objective
    from engine.train.optimizer import AdamW, clip_scale
    from engine.weights import load_model
    from kernels.threads import set_num_threads

    set_num_threads(options.threads)
    settings = ModelConfig(base="x", dtype=options.dtype)
    model = load_model(settings, options.folder / "nf4", "cpu").model
    config = TrainConfig(rank=options.rank, dropout=options.dropout)
    adapter = TrainableAdapter.create(model.spec, config, "cpu")
    optimizer, objective = AdamW(adapter.groups, config), make_objective(config)
    batch = make_batch([(row, torch.ones(len(row))) for row in input_ids], "cpu")
    number = 0

    def step() -> None:
        nonlocal number
        adapter.zero_grads()
        seed, denominator = noise_seed(0, number, 0), denominator_of(objective, batch)
        for _ in forward_backward(
            model, adapter, batch, objective, denominator=denominator, seed=seed
        ):
            pass
        scale = clip_scale(optimizer.grad_norm(), MAX_GRAD_NORM)
        for _ in optimizer.update(LEARNING_RATE, scale):
            pass
        number += 1

    return step


def prepare_peft(options: argparse.Namespace, input_ids: torch.Tensor) -> Callable[[], None]:
    """One step of theirs, everything kept for the backward pass."""
    return _prepare_peft(options, input_ids, is_checkpointing=False)


def prepare_peft_checkpointing(
    options: argparse.Namespace, input_ids: torch.Tensor
) -> Callable[[], None]:
    """One step of theirs by QLoRA's recipe."""
    return _prepare_peft(options, input_ids, is_checkpointing=True)


def _prepare_peft(
    options: argparse.Namespace, input_ids: torch.Tensor, *, is_checkpointing: bool
) -> Callable[[], None]:
    import peft
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder / "dense", quantization_config=quantisation, dtype=dtype
    )
    if is_checkpointing:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    lora = peft.LoraConfig(
        r=options.rank, lora_alpha=16, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, lora).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    is_autocast = dtype == torch.bfloat16

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


SYSTEMS = {
    "herd": prepare_herd,
    "peft": prepare_peft,
    "peft-checkpointing": prepare_peft_checkpointing,
}

if __name__ == "__main__":
    main()
