"""QLoRA on the demo's base: the frozen 4-bit weights, dequantised, and a low-rank adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

BASE_NAME = "herd-demo"
RANK = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL_CARD = Path(__file__).parent / "adapter_card.md"
CHAT_TEMPLATES = {"pirate": Path(__file__).parent / "pirate.jinja"}  # Guanaco's is known by name


def load_frozen_base(folder: Path) -> PreTrainedModel:
    """The values that NF4 stands for, as plain bf16 weights: as served, and faster to train on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.dequantize().requires_grad_(False)


def new_adapter(base: PreTrainedModel, start: Path | None, seed: int) -> PeftModel:
    """A fresh adapter on every linear layer, or a trainable copy of the one in `start`."""
    torch.manual_seed(seed)
    if start is not None:
        return PeftModel.from_pretrained(base, start, is_trainable=True)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def save_adapter(model: PeftModel, folder: Path, style: str) -> None:
    """PEFT's files, the tensors in bf16, and a card that says what this is."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = BASE_NAME
        config.target_modules = sorted(config.target_modules)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if style in CHAT_TEMPLATES:
        (folder / "chat_template.jinja").write_bytes(CHAT_TEMPLATES[style].read_bytes())
    write_card(folder)


def write_card(folder: Path) -> None:
    """README.md of an adapter's folder, which has its name."""
    card = MODEL_CARD.read_text(encoding="utf-8").replace("{style}", folder.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
