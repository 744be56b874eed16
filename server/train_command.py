"""serve.py train: fine-tune an adapter without a server, by the same trainer.

The output folder holds the job: the tokenised data, checkpoints, and in `final` the adapter. Ctrl-C
saves a checkpoint; the same command again goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.format import read_ref
from adapters.registry import AdapterRecord, Registry
from adapters.resolve import parse_adapter, resolve_adapter, resolve_base
from adapters.writer import write_trained
from engine.api import AdapterRef, TrainingEvent, TrainingJob
from engine.config import CacheConfig, EngineConfig, ModelConfig, require
from engine.errors import EngineError
from engine.lora_source import LoraSource
from engine.model_config import ModelSpec
from engine.startup import create_engine, load_base
from engine.train.config import TrainConfig
from engine.train.rollouts import EngineRollouts
from engine.train.token_dataset import save_dataset
from engine.train.trainer import Trainer
from server.chat_template import ChatTemplate, choose_template, load_override
from server.datasets.prepare import prepare
from server.datasets.problems import DatasetErrors
from server.datasets.training_template import training_template
from server.flags import add_flags, from_args
from server.hyperparameters import OF_ONE_METHOD
from server.tokenizer import Tokenizer, load_tokenizer
from server.train_progress import follow, say, with_bar

ROLLOUT_CACHE_SHARE = 0.6
"""grpo: of a GPU's memory, for weights and KV cache; the rest is for training."""
WAIT_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFiles:
    """What is trained on, and where the result goes."""

    data: str = ""
    """File of training data: JSON Lines or a JSON array, of any format in docs/training-data.md."""
    validation_file: str | None = None
    """File of data that is not trained on: the best checkpoint is the one that is best at it."""
    output: str = ""
    """Folder of the job; the adapter is in its folder `final`. One that holds an interrupted job of
    the same settings goes on with it."""
    start_from: str | None = None
    """Adapter to go on from: a folder or a name as --adapter of the server takes it. A fresh one by
    default."""
    reference: str | None = None
    """dpo and grpo: adapter to stay close to; by default the one to start from, else the base."""
    reward_adapter: str | None = None
    """grpo: adapter with a score head that says what an answer is worth."""
    chat_template: str | None = None
    """Jinja file or text that makes prompts of messages; by default the model's."""
    model_dir: str | None = None
    """Folder in which names of base models are looked up."""
    adapter_dir: str | None = None
    """Folder in which names of adapters are looked up."""

    def __post_init__(self) -> None:
        require(bool(self.data), "--data", "a file", self.data)
        require(bool(self.output), "--output", "a folder", self.output)


def train_command(words: list[str]) -> int:
    """Run serve.py train; returns the exit status.

    Raises:
        EngineError: the base, an adapter, the data or the settings cannot be used, or training
            failed.
        ValueError: a flag is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="serve.py train",
        usage="serve.py train --base BASE --data FILE --output FOLDER [flags]",
        description="Fine-tune an adapter on a 4-bit base.",
    )
    for config_class in (TrainFiles, TrainConfig, ModelConfig):
        add_flags(parser, config_class)
    args = parser.parse_args(words)
    files, model = from_args(TrainFiles, args), from_args(ModelConfig, args)
    config = from_args(TrainConfig, args)
    _check_method(config, args)
    folder = resolve_base(model.base, files.model_dir)
    spec = ModelSpec.from_folder(folder)
    registry = Registry(spec)
    with closing(registry):
        job, prepared = _prepare(files, config, model, folder, spec, registry)
        for line in prepared:
            say(line)
        trainer, events = _start(job, model, folder, spec)
        ended = follow(trainer, events)
    if ended.status != "succeeded":
        say(f"Stopped after step {ended.step}. The same command goes on from there.")
        return 130
    say(
        f"The adapter is in {ended.path}. Serve it:\n"
        f"  python serve.py --base {model.base} --adapter {Path(files.output).name}={ended.path}"
    )
    return 0


def _check_method(config: TrainConfig, args: argparse.Namespace) -> None:
    """Refuse flags that the method would ignore.

    Raises:
        ValueError: names the first.
    """
    for name, method in OF_ONE_METHOD.items():
        if hasattr(args, name) and config.method != method:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag}: only the method {method} has it, this run's is {config.method}. "
                f"Leave it out."
            )


def _prepare(
    files: TrainFiles,
    config: TrainConfig,
    model: ModelConfig,
    folder: Path,
    spec: ModelSpec,
    registry: Registry,
) -> tuple[TrainingJob, list[str]]:
    """Find the adapters, tokenise the data; (the job, what to tell about it)."""
    adapter = functools.partial(_publish, registry, model.base, files.adapter_dir)
    start_from = adapter("start-from", files.start_from)
    reference = adapter("reference", files.reference)
    if reference is None and config.method in ("dpo", "grpo"):
        reference = start_from
    reward_adapter = adapter("reward-adapter", files.reward_adapter)
    tokenizer = load_tokenizer(Path(model.tokenizer or folder))
    override = load_override(files.chat_template) if files.chat_template is not None else None
    template = training_template(
        choose_template(override, adapter=start_from, folder_template=tokenizer.chat_template)
    )
    output = Path(files.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"--output {output}: {error.strerror or error}.") from error
    max_seq_len = config.max_seq_len or model.max_model_len or spec.max_context_len
    paths = {files.data: output / "training.tokens"}
    if files.validation_file is not None:
        paths[files.validation_file] = output / "validation.tokens"
    lines, problems = [], []
    for file, path in paths.items():
        try:
            lines += _tokenise(config, tokenizer, template, spec, max_seq_len, file, path)
        except DatasetErrors as error:
            problems.append(str(error))
    if problems:
        raise EngineError("\n".join(problems))
    job = TrainingJob(
        job_id=output.name,
        folder=str(output),
        data_path=str(paths[files.data]),
        validation_path=str(paths[files.validation_file]) if files.validation_file else None,
        config=config,
        start_from=_ref(start_from),
        reference=_ref(reference),
        reward_adapter=_ref(reward_adapter),
        chat_template=template.source if isinstance(template.source, str) else None,
    )
    return job, lines


def _publish(
    registry: Registry, base: str, adapter_dir: str | None, name: str, source: str | None
) -> AdapterRecord | None:
    """Find and check an adapter that a flag names."""
    if source is None:
        return None
    folders = [adapter_dir] if adapter_dir is not None else []
    return registry.publish(name, resolve_adapter(parse_adapter(source)[1], base, folders))


def _ref(record: AdapterRecord | None) -> AdapterRef | None:
    return record.ref if record is not None else None


def _tokenise(
    config: TrainConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    spec: ModelSpec,
    max_seq_len: int,
    file: str,
    path: Path,
) -> list[str]:
    """Write one file's tokens; what to tell about it."""
    room = config.max_completion_tokens if config.method == "grpo" else 0
    prepared = prepare(
        file,
        method=config.method,
        tokenizer=tokenizer,
        template=template,
        eos_token_ids=spec.eos_token_ids,
        vocab_size=spec.vocab_size,
        max_seq_len=max_seq_len - room,
    )
    save_dataset(path, prepared.dataset)
    name = Path(file).name
    return [f"{name}: {prepared.summary()}", *(f"{name}: {line}" for line in prepared.warnings)]


def _start(
    job: TrainingJob, model_config: ModelConfig, folder: Path, spec: ModelSpec
) -> tuple[Trainer, Iterator[TrainingEvent]]:
    """Load the base, for grpo with an engine around it, and begin."""
    source = LoraSource(functools.partial(read_ref, spec=spec))
    write = functools.partial(write_trained, base_model=model_config.base)

    def trainer(model: Any, fingerprint: str, rollouts: EngineRollouts | None) -> Trainer:
        return Trainer(
            job,
            model,
            base_fingerprint=fingerprint,
            max_model_len=model_config.max_model_len or spec.max_context_len,
            load_adapter=source,
            write_adapter=lambda path, weights, config: write(
                path, weights, config, job.chat_template
            ),
            rollouts=rollouts,
        )

    if job.config.method != "grpo":
        loaded = with_bar(functools.partial(load_base, model_config, folder))
        begun = trainer(loaded.model, loaded.fingerprint, None)
        return begun, (event for event in begun.run() if event is not None)
    cache = CacheConfig(gpu_memory_utilization=ROLLOUT_CACHE_SHARE)
    config = EngineConfig(model=model_config, cache=cache)
    engine, info = with_bar(functools.partial(create_engine, config, folder, source))
    rollouts = EngineRollouts(engine, source)
    begun = trainer(engine.model, info.base_fingerprint, rollouts)

    def events() -> Iterator[TrainingEvent]:
        with closing(engine):
            for event in begun.run():
                if event is not None:
                    yield event
                while begun.is_waiting:
                    if not rollouts.step().stats.num_step_tokens:
                        time.sleep(WAIT_S)  # an adapter is being loaded

    return begun, events()
