"""Herd's loss curves beside those of peft + trl: the whole of both trainers on a tiny random LLaMA,
with the same adapter to begin with and the same batches.

trl trains on the dequantised weights, so that both see the same numbers. What is compared is the
loss of every optimizer step, before its update.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from engine.api import TrainingJob, TrainingProgress
from engine.config import ModelConfig
from engine.head import dense_weight
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batches import epoch_batches, sample_lengths
from engine.train.config import Method, TrainConfig
from engine.train.token_dataset import TokenDataset, make_dataset, save_dataset
from engine.train.trainer import Trainer
from engine.weights import load_model

VOCAB_SIZE = 160
PAD, BOS, EOS = 0, 1, 2
METHODS: tuple[Method, ...] = ("supervised", "reward", "dpo")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}
BATCH_SIZE = 4
SETTINGS = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "max_grad_norm": 1.0, "warmup_ratio": 0.0}
LEARNING_RATE = 1e-3


def measure_parity(dtype: str, method: Method, num_steps: int) -> dict[str, Any]:
    """Both curves and their largest difference."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _make_source(folder / "base", dtype)
        settings = ModelConfig(base="x", dtype=dtype, quantized_cache_dir=str(folder / "cache"))
        model = load_model(settings, folder / "base", "cpu").model
        dataset = _make_data(method, BATCH_SIZE * num_steps)
        config = TrainConfig(
            method=method, learning_rate=LEARNING_RATE, batch_size=BATCH_SIZE, max_steps=num_steps,
            micro_batch_tokens=64, save_every_steps=10**6, **SETTINGS,
        )  # fmt: skip
        ours = _train_ours(model, dataset, config, folder)
        theirs = _train_theirs(source, model, dataset, config, dtype, folder)
    assert len(ours) == len(theirs) == num_steps, (len(ours), len(theirs))
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "method": method,
        "dtype": dtype,
        "steps": num_steps,
        "largest_difference": max(differences),
        "tolerance": TOLERANCE[dtype],
        "holds": max(differences) <= TOLERANCE[dtype],
        "herd": [round(value, 6) for value in ours],
        "peft_trl": [round(value, 6) for value in theirs],
    }


def _make_source(folder: Path, dtype: str) -> Any:
    """transformers' model, saved; its norms are random too."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        centre = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, centre, 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model


def _make_data(method: Method, num_samples: int) -> TokenDataset:
    """Random samples with something to learn: a better answer counts upwards from the prompt."""
    generator = torch.Generator().manual_seed(1)
    sequences: list[tuple[list[int], list[float]]] = []
    for _ in range(num_samples):
        sizes = torch.randint(4, 12, (3,), generator=generator).tolist()
        prompt = torch.randint(10, 60, (sizes[0],), generator=generator).tolist()
        better = [(prompt[-1] + 1 + i) % 100 + 3 for i in range(sizes[1])]
        worse = torch.randint(3, VOCAB_SIZE, (sizes[2],), generator=generator).tolist()
        for answer in (better,) if method == "supervised" else (better, worse):
            weights = [0.0] * len(prompt) + [1.0] * (len(answer) + 1)
            sequences.append((prompt + answer + [EOS], weights))
    return make_dataset("supervised" if method == "supervised" else "preference", sequences)


def _train_ours(
    model: CausalLM, dataset: TokenDataset, config: TrainConfig, folder: Path
) -> list[float]:
    """The loss of each step, from the trainer's own events."""
    save_dataset(folder / "data", dataset)
    job = TrainingJob(
        job_id="parity", folder=str(folder / "job"), data_path=str(folder / "data"), config=config
    )
    trainer = Trainer(
        job, model, base_fingerprint="parity", max_model_len=256,
        load_adapter=lambda _: (_ for _ in ()).throw(NotImplementedError),
        write_adapter=lambda path, *_args, **_kw: Path(path).mkdir(parents=True, exist_ok=True),
    )  # fmt: skip
    events = [event for event in trainer.run() if isinstance(event, TrainingProgress)]
    return [dict(event.metrics)["train_loss"] for event in events]


def _train_theirs(
    source: Any,
    model: CausalLM,
    dataset: TokenDataset,
    config: TrainConfig,
    dtype: str,
    folder: Path,
) -> list[float]:
    """The loss of each step, from trl's log."""
    import datasets
    import peft
    import trl

    common = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "sequential", "max_steps": config.max_steps,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "max_grad_norm": config.max_grad_norm, "adam_beta2": config.beta2, "weight_decay": 0.0,
        "optim": "adamw_torch", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "use_cpu": True, "bf16": dtype == "bfloat16", "gradient_checkpointing": False,
        "max_length": None, "disable_tqdm": True,
    }  # fmt: skip
    is_reward = config.method == "reward"
    adapter = TrainableAdapter.create(model.spec, config, "cpu")
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=_names(adapter),
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        modules_to_save=["score"] if is_reward else None,
    )  # fmt: skip
    arguments = {
        "model": _dequantised(source, model, is_reward),
        "train_dataset": datasets.Dataset.from_list(_rows(dataset, config)),
        "processing_class": _tokenizer(),
        "peft_config": lora,
    }
    if config.method == "supervised":
        settings = trl.SFTConfig(**common, completion_only_loss=True)
        trainer = trl.SFTTrainer(args=settings, **arguments)
    elif config.method == "reward":
        trainer = trl.RewardTrainer(args=trl.RewardConfig(**common), **arguments)
    else:
        settings = trl.DPOConfig(**common, beta=config.beta)
        trainer = trl.DPOTrainer(args=settings, **arguments)
    _begin_alike(trainer.model, adapter)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _dequantised(source: Any, model: CausalLM, is_reward: bool) -> Any:
    """The transformers model with our base's numbers."""
    import transformers

    for path in model.spec.linear_shapes():
        weight = model.base_linear(path).weight
        assert weight is not None
        source.get_submodule(path).weight.data = dense_weight(weight).to(source.dtype).clone()
    if not is_reward:
        return source
    source.config.num_labels = 1
    classifier = transformers.LlamaForSequenceClassification(source.config).to(source.dtype)
    classifier.model.load_state_dict(source.model.state_dict())
    return classifier


def _names(adapter: TrainableAdapter) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in adapter.modules})


def _begin_alike(theirs: Any, adapter: TrainableAdapter) -> None:
    """Give peft's model our adapter's values."""
    for path, module in adapter.modules.items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.data.copy_(module.a)
        layer.lora_B["default"].weight.data.copy_(module.b)
    if adapter.score is not None:
        head = theirs.get_submodule("base_model.model.score").modules_to_save["default"]
        head.weight.data = adapter.score.clone()


def _rows(dataset: TokenDataset, config: TrainConfig) -> list[dict[str, Any]]:
    """The samples as trl reads them, in the order in which our trainer takes them."""
    batches = epoch_batches(
        sample_lengths(dataset), batch_size=BATCH_SIZE, seed=config.seed, epoch=0,
        group_by_length=False,
    )  # fmt: skip
    rows = []
    for index in (index for batch in batches for index in batch):
        if config.method == "supervised":
            ids, weights = dataset.sequence(index)
            mask = [int(weight) for weight in weights.tolist()]
            rows.append({"input_ids": ids.tolist(), "completion_mask": mask})
            continue
        (better, weights), (worse, _) = (dataset.sequence(2 * index + side) for side in (0, 1))
        if config.method == "reward":
            rows.append({"chosen_ids": better.tolist(), "rejected_ids": worse.tolist()})
            continue
        start = int((weights == 0).sum())
        rows.append(
            {
                "prompt": _text(better[:start]),
                "chosen": " " + _text(better[start:]),
                "rejected": " " + _text(worse[start:]),
            }
        )
    return rows


def _word(token: int) -> str:
    return {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}.get(token, f"w{token}")


def _text(ids: torch.Tensor) -> str:
    return " ".join(map(_word, ids.tolist()))


def _tokenizer() -> Any:
    """One token per word, because trl takes preferences as text only."""
    import tokenizers
    import transformers

    vocabulary = {_word(token): token for token in range(VOCAB_SIZE)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
