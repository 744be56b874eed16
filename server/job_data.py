"""What a job needs before it can run: tokenised data and frozen copies of the adapters it names.

jobs/<id>/train.safetensors, validation.safetensors   tokens, as engine/train reads them
jobs/<id>/chat_template.jinja                          where the result needs one of its own
jobs/<id>/start/, reward/                              adapters as they were at creation
jobs/<id>/checkpoint-<step>/, final/                   written by the trainer
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from adapters.confine import copy_adapter
from adapters.folder import CHAT_TEMPLATE_FILE
from adapters.registry import AdapterRecord
from engine.api import AdapterRef, AdapterReply, EngineInfo, TrainingEvent, TrainingJob
from engine.train.config import TrainConfig
from server.adapters import Adapters
from server.chat_template import ChatTemplate, choose_template, stored_template
from server.data_folder import DataFolder
from server.database import Database
from server.datasets.training_template import training_template
from server.files import Files
from server.hyperparameters import AUTO, MULTIPLIER, config_from_json
from server.job_store import Job
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.model_config import ModelSpec
    from server.datasets.prepare import Prepared

START, REWARD = "start", "reward"
TRAINING_DATA, VALIDATION_DATA = "train.safetensors", "validation.safetensors"


class TrainingEngine(Protocol):
    """The part of EngineClient that jobs need."""

    on_training_event: Callable[[TrainingEvent], None] | None

    @property
    def state(self) -> str: ...
    @property
    def info(self) -> EngineInfo | None: ...
    def start_training(self, job: TrainingJob) -> None: ...
    def stop_training(self, job_id: str, status: Literal["paused", "cancelled"]) -> None: ...
    async def load_adapter(self, ref: AdapterRef) -> AdapterReply: ...
    async def unload_adapter(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What jobs work with."""

    database: Database
    folder: DataFolder
    files: Files
    engine: TrainingEngine
    adapters: Adapters
    tokenizer: Tokenizer
    spec: ModelSpec
    prepare: Callable[..., Prepared]
    """server/datasets/prepare.prepare."""
    model_names: tuple[str, ...]
    """The base's; fine-tuned models are called after the first."""
    chat_template: ChatTemplate | None = None
    """--chat-template."""
    max_lora_rank: int | None = None
    tensorboard_dir: str | None = None


def freeze_adapter(path: Path, folder: Path, part: str) -> None:
    """Copy an adapter into a job's folder: its name may mean something else when the job runs.

    Raises:
        AdapterError: it cannot be copied.
    """
    destination = folder / part
    destination.mkdir(parents=True)
    copy_adapter(path, destination, None)


def save_template(shop: Workshop, start: AdapterRecord | None, folder: Path) -> None:
    """Choose the template that conversations are trained in: the one that the start adapter, or the
    base, is served with; Guanaco's where there is none. It is kept where the base does not bring it
    along, for the result will need it."""
    own = shop.tokenizer.chat_template
    served = choose_template(shop.chat_template, adapter=start, folder_template=own)
    template = training_template(served)
    if isinstance(template.source, str) and template.source != own:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHAT_TEMPLATE_FILE).write_text(template.source, encoding="utf-8")


def job_template(shop: Workshop, folder: Path) -> ChatTemplate:
    """What save_template chose."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return stored_template(path.read_text(encoding="utf-8"), "the template of this job")
    own = shop.tokenizer.chat_template
    return training_template(choose_template(None, adapter=None, folder_template=own))


def add_template(folder: Path, adapter_folder: Path) -> None:
    """Put the job's template beside an adapter that it has trained."""
    source = folder / CHAT_TEMPLATE_FILE
    if source.is_file() and not (adapter_folder / CHAT_TEMPLATE_FILE).exists():
        shutil.copyfile(source, adapter_folder / CHAT_TEMPLATE_FILE)


def prepare_file(
    path: Path,
    folder: Path,
    part: str,
    *,
    file_name: str,
    config: TrainConfig,
    shop: Workshop,
    info: EngineInfo,
) -> Prepared:
    """Tokenise one file into a job's folder; CPU work, for a thread.

    Raises:
        DatasetErrors: it cannot be trained on.
        OSError: no room for the tokens.
    """
    from engine.train.token_dataset import save_dataset

    prepared = shop.prepare(
        path,
        method=config.method,
        tokenizer=shop.tokenizer,
        template=job_template(shop, folder),
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        max_seq_len=config.max_seq_len or info.max_model_len,
        file_name=file_name,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_dataset(folder / part, prepared.dataset)
    return prepared


def training_job(job: Job, shop: Workshop, info: EngineInfo) -> TrainingJob:
    """What the worker is told. Refs have numbers that no published adapter has."""
    folder = shop.folder.job(job.id)

    def frozen(part: str, index: int) -> AdapterRef | None:
        path = folder / part
        if not path.is_dir():
            return None
        uid = -2 * job.number - index
        return AdapterRef(uid=uid, generation=1, name=f"{job.id}/{part}", path=str(path))

    config = config_from_json(job.config)
    start = frozen(START, 0)
    has_validation = (folder / VALIDATION_DATA).exists()
    return TrainingJob(
        job_id=job.id,
        folder=str(folder),
        data_path=str(folder / TRAINING_DATA),
        validation_path=str(folder / VALIDATION_DATA) if has_validation else None,
        config=with_multiplier(config, job.hyperparameters.get(MULTIPLIER), shop.spec, info),
        start_from=start,
        reference=start if config.method in ("dpo", "grpo") else None,
        reward_adapter=frozen(REWARD, 1),
    )


def with_multiplier(
    config: TrainConfig, multiplier: float | str | None, spec: ModelSpec, info: EngineInfo
) -> TrainConfig:
    """learning_rate_multiplier times what would be chosen without it."""
    if multiplier in (None, AUTO) or config.learning_rate is not None:
        return config
    import torch

    from engine.train.defaults import resolve

    usual = resolve(
        config, spec, num_samples=1, max_model_len=info.max_model_len, device=torch.device("cpu")
    )
    assert usual.learning_rate is not None
    return dataclasses.replace(config, learning_rate=usual.learning_rate * float(multiplier or 1))


def remove_data(folder: Path) -> None:
    """Forget what only a job needs that goes on: tokens, frozen adapters, the trainer's state.
    Checkpoints stay as adapters, and so does the result."""
    from engine.train.checkpoint import TENSORS_FILE

    states = folder.glob(f"checkpoint-*/{TENSORS_FILE}")
    for path in (folder / TRAINING_DATA, folder / VALIDATION_DATA, *states):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    for part in (START, REWARD):
        shutil.rmtree(folder / part, ignore_errors=True)
