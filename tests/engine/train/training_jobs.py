"""Small jobs on a tiny model, and a writer of adapters. Not a test module."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.api import TrainingCheckpoint, TrainingEnded, TrainingJob, TrainingNote
from engine.config import ModelConfig
from engine.lora import LoraWeights
from engine.model import CausalLM
from engine.train.batches import Sample
from engine.train.config import TrainConfig
from engine.train.noise import noise_seed
from engine.train.token_dataset import Kind, make_dataset, save_dataset
from engine.train.trainer import Trainer
from engine.weights import load_model

ADAPTER_FILE = "adapter_model.safetensors"


def load_base(folder: Path, cache: Path, dtype: str = "float32") -> CausalLM:
    """The model in a folder, quantised, on the CPU."""
    flags = ModelConfig(base="x", dtype=dtype, quantized_cache_dir=str(cache))
    return load_model(flags, folder, torch.device("cpu")).model


def write_plain(path: Path, weights: LoraWeights, config: TrainConfig) -> None:
    """The weights as tensors, nothing of PEFT."""
    path.mkdir(exist_ok=True)
    tensors = {f"{name}.a": module.a for name, module in weights.modules.items()}
    tensors |= {f"{name}.b": module.b for name, module in weights.modules.items()}
    save_file(tensors | weights.replaced, path / ADAPTER_FILE, {"rank": str(config.rank)})


def read_plain(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / ADAPTER_FILE)


def write_data(path: Path, kind: Kind = "supervised", num: int = 24, seed: int = 0) -> str:
    """Sequences of 4 to 20 tokens that count; the worse one of a pair has other tokens."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for index in range(num):
        length = int(torch.randint(4, 21, (1,), generator=generator))
        first = int(torch.randint(3, 60, (1,), generator=generator))
        lowest = 20 if kind == "preference" and index % 2 else 3
        ids = [lowest + (first + i) % 8 for i in range(length)]
        weights = [0.0] * length if kind == "prompt" else [0.0, 0.0, *[1.0] * (length - 2)]
        sequences.append((ids, weights))
    save_dataset(path, make_dataset(kind, sequences))
    return str(path)


def make_job(folder: Path, *, kind: Kind = "supervised", validation: bool = False, **settings):
    """A job of 6 steps of 4 samples, rank 8, with everything random switched on."""
    data = folder.parent / f"{kind}.data"
    if not data.exists():
        write_data(data, kind)
    valid = folder.parent / f"{kind}.valid"
    if validation and not valid.exists():
        write_data(valid, kind, num=8, seed=1)
    defaults = {
        "rank": 8,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "max_steps": 6,
        "micro_batch_tokens": 40,
        "dropout": 0.1,
        "neftune_alpha": 5.0,
        "save_every_steps": 2,
        "eval_every_steps": 2,
        "warmup_ratio": 0.0,
    }
    return TrainingJob(
        job_id="job",
        folder=str(folder),
        data_path=str(data),
        validation_path=str(valid) if validation else None,
        config=TrainConfig(**{**defaults, **settings}),
    )


def make_trainer(job: TrainingJob, model: CausalLM, **options) -> Trainer:
    def no_adapter(ref):
        raise AssertionError(f"nobody asked for {ref}")

    arguments = {
        "base_fingerprint": "base",
        "max_model_len": 64,
        "load_adapter": no_adapter,
        "write_adapter": write_plain,
    }
    return Trainer(job, model, **{**arguments, **options})


def run_job(job: TrainingJob, model: CausalLM, **options) -> list:
    """All events of a job, from where it stands to its end."""
    trainer = make_trainer(job, model, **options)
    return [event for event in trainer.run() if event is not None]


def of(events: list, kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def ended(events: list) -> TrainingEnded:
    assert isinstance(events[-1], TrainingEnded)
    return events[-1]


def notes(events: list) -> str:
    return "\n".join(event.message for event in of(events, TrainingNote))


def checkpoint_steps(events: list) -> list[int]:
    return [event.step for event in of(events, TrainingCheckpoint)]


def metric(event, name: str) -> float:
    return dict(event.metrics)[name]


class FakeRollouts:
    """Answers that depend on the policy, the step and the prompt alone, as real ones do; a low
    token is worth most. Takes `num_slices` slices for a batch.
    """

    def __init__(self, num_slices: int = 3) -> None:
        self.num_slices = num_slices
        self.is_waiting = False
        self.drawn: list[tuple[int, bool]] = []
        self.was_closed = False

    def draw(self, policy, prompts, *, config, reward_adapter, step, is_evaluation=False):
        assert reward_adapter is not None
        self.drawn.append((step, is_evaluation))
        try:
            self.is_waiting = True
            for _ in range(self.num_slices):
                yield
        except GeneratorExit:
            self.was_closed = True
            raise
        finally:
            self.is_waiting = False
        total = sum(module.b.sum().item() for module in policy.modules.values())
        generator = torch.Generator().manual_seed(noise_seed(step, str(total)))
        samples, rewards = [], []
        for prompt in prompts:
            answers = torch.randint(3, 97, (config.num_generations, 4), generator=generator)
            scores = -answers.double().mean(dim=1)
            advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
            for answer, advantage in zip(answers, advantages.tolist(), strict=True):
                ids = torch.tensor([*prompt, *answer.tolist()], dtype=torch.int32)
                weights = torch.tensor([0.0] * len(prompt) + [1.0] * 4)
                samples.append(Sample(((ids, weights),), advantage))
            rewards += scores.tolist()
        metrics = {"reward": (sum(rewards), float(len(rewards)))}
        return types.SimpleNamespace(samples=samples, metrics=metrics)
