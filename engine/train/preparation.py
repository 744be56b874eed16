"""From a job to everything that its first step needs: data, adapter, optimizer, where it stands."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.api import AdapterRef, TrainingJob
from engine.errors import EngineError, RequestError
from engine.lora import LoraWeights
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.batches import sample_lengths
from engine.train.checkpoint import (
    DamagedCheckpoint,
    TrainerState,
    check_same_run,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_unfinished,
)
from engine.train.config import TrainConfig
from engine.train.defaults import resolve
from engine.train.objectives import Objective, make_objective
from engine.train.optimizer import AdamW
from engine.train.token_dataset import METHOD_KIND, TokenDataset, load_dataset

MASTER = "master."
"""Before a group's name, in a checkpoint's tensors; before the optimizer's names is OPTIMIZER."""
OPTIMIZER = "optimizer."
MAX_NAMED = 10
"""Samples named in an error."""


@dataclass(slots=True)
class Run:
    """A job that is ready to go on."""

    dataset: TokenDataset
    lengths: torch.Tensor
    """int64 [num_samples] of the data set."""
    validation: TokenDataset | None
    adapter: TrainableAdapter
    optimizer: AdamW
    objective: Objective
    state: TrainerState
    notes: list[str]
    """What the job's owner should know."""

    @property
    def config(self) -> TrainConfig:
        """Resolved."""
        return self.state.config

    @property
    def num_steps(self) -> int:
        assert self.config.max_steps is not None
        return self.config.max_steps

    @property
    def steps_per_epoch(self) -> int:
        assert self.config.batch_size is not None
        return math.ceil(self.dataset.num_samples / self.config.batch_size)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that changes, for a checkpoint."""
        masters = {f"{MASTER}{group.name}": group.master for group in self.adapter.groups}
        state = self.optimizer.state_dict()
        return masters | {f"{OPTIMIZER}{name}": tensor for name, tensor in state.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what tensors() gave.

        Raises:
            EngineError: they are another adapter's.
        """
        own = {f"{MASTER}{group.name}": group.master for group in self.adapter.groups}
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(MASTER)}
        if {name: t.shape for name, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise EngineError(
                "The checkpoint is of another adapter: rank or target modules differ. Resume with "
                "the settings that the job was started with."
            )
        for name, master in own.items():
            master.copy_(saved[name])
        self.optimizer.load_state_dict(
            {
                name.removeprefix(OPTIMIZER): tensor
                for name, tensor in tensors.items()
                if name.startswith(OPTIMIZER)
            }
        )


def prepare(
    job: TrainingJob,
    model: CausalLM,
    *,
    base_fingerprint: str,
    max_model_len: int,
    load_adapter: Callable[[AdapterRef], LoraWeights],
) -> Run:
    """Read and check the data, make the adapter, and go to where the newest checkpoint stands.

    Args:
        job:              what to train.
        model:            the base.
        base_fingerprint: the base's.
        max_model_len:    tokens that the base is served with.
        load_adapter:     reads an adapter from disk.

    Raises:
        EngineError: the data, the settings or an adapter cannot be used; every reason is named.
    """
    dataset = load_dataset(job.data_path)
    validation = load_dataset(job.validation_path) if job.validation_path is not None else None
    _check_data(job, dataset, "training data")
    if validation is not None:
        _check_data(job, validation, "validation data")
    _check_job(job)
    config = resolve(
        job.config,
        model.spec,
        num_samples=dataset.num_samples,
        max_model_len=max_model_len,
        device=model.device,
    )
    for data, name in ((dataset, "training data"), (validation, "validation data")):
        if data is not None:
            _check_lengths(data, config, name)
    adapter = TrainableAdapter.create(model.spec, config, model.device)
    reference = load_adapter(job.reference) if job.reference is not None else None
    assert config.micro_batch_tokens is not None
    run = Run(
        dataset=dataset,
        lengths=sample_lengths(dataset),
        validation=validation,
        adapter=adapter,
        optimizer=AdamW(adapter.groups, config),
        objective=make_objective(config, reference),
        state=TrainerState(
            config=config,
            base_fingerprint=base_fingerprint,
            data_digest=_digest(dataset),
            micro_batch_tokens=config.micro_batch_tokens,
        ),
        notes=[],
    )
    if not _resume(run, Path(job.folder), job.config) and job.start_from is not None:
        adapter.load_weights(load_adapter(job.start_from))
    return run


def _resume(run: Run, folder: Path, given: TrainConfig) -> bool:
    """Go to where the newest usable checkpoint stands; whether there was one."""
    remove_unfinished(folder)
    for path in list_checkpoints(folder):
        try:
            state, tensors = load_checkpoint(path)
        except DamagedCheckpoint as error:
            run.notes.append(f"{path.name} is damaged and was passed over: {error}")
            continue
        check_same_run(state, run.state, folder)
        run.restore(tensors)
        run.state = _continued(state, run.config, given)
        run.notes.append(f"Going on from {path.name}.")
        _check_best(run, folder)
        return True
    return False


def _continued(state: TrainerState, config: TrainConfig, given: TrainConfig) -> TrainerState:
    """A checkpoint's state under the settings of now. What the run itself has chosen for the
    micro-batches stays, for another choice would round otherwise.
    """
    before = state.config.micro_batch_tokens
    tokens = given.micro_batch_tokens or before
    config = dataclasses.replace(config, micro_batch_tokens=tokens)
    if tokens is not None and tokens != before:
        state = dataclasses.replace(state, micro_batch_tokens=tokens)
    return dataclasses.replace(state, config=config)


def _check_best(run: Run, folder: Path) -> None:
    """Forget a best checkpoint that is no more: the next evaluation finds another."""
    if run.state.best_step is None:
        return
    path = checkpoint_path(folder, run.state.best_step)
    try:
        read_state(path)
    except DamagedCheckpoint as error:
        run.notes.append(f"{path.name}, the best so far, is lost: {error}")
        run.state = dataclasses.replace(run.state, best_step=None, best_value=None)


def _check_job(job: TrainingJob) -> None:
    problems = []
    if job.config.early_stopping_patience is not None and job.validation_path is None:
        problems.append("early_stopping_patience needs validation data to wait for")
    if job.config.method == "grpo" and job.reward_adapter is None:
        problems.append("grpo needs a reward adapter that says what an answer is worth")
    if job.reference is not None and job.config.method not in ("dpo", "grpo"):
        problems.append(f"a reference is of no use to the method {job.config.method}")
    if problems:
        raise RequestError("This job cannot run: " + "; ".join(problems) + ".")


def _check_data(job: TrainingJob, dataset: TokenDataset, name: str) -> None:
    """The kind that the method reads, not empty, and something to learn in each sample."""
    expected = METHOD_KIND[job.config.method]
    if dataset.kind != expected:
        raise RequestError(
            f"The {name} are of kind {dataset.kind}, but the method {job.config.method} reads "
            f"{expected} data. Prepare them for this method."
        )
    if dataset.num_samples == 0:
        raise RequestError(f"The {name} are empty. Add samples.")
    if bool((dataset.offsets.diff() == 0).any()):
        raise RequestError(f"The {name} hold an empty sample. Prepare them again.")
    if dataset.kind != "prompt":
        is_label = dataset.loss_weights > 0
        is_label[dataset.offsets[:-1]] = False  # nothing precedes a sequence's first token
        totals = is_label.cumsum(0, dtype=torch.int32)[dataset.offsets[1:] - 1]
        num_labels = torch.diff(totals, prepend=totals.new_zeros(1))
        _refuse(num_labels == 0, dataset, name, "have no token to learn from", "Leave them out.")


def _check_lengths(dataset: TokenDataset, config: TrainConfig, name: str) -> None:
    assert config.max_seq_len is not None
    room, reason = config.max_seq_len, f"are longer than max_seq_len, {config.max_seq_len} tokens"
    if config.method == "grpo":
        room -= config.max_completion_tokens
        reason = (
            f"leave no room for an answer of {config.max_completion_tokens} tokens within "
            f"max_seq_len, {config.max_seq_len}"
        )
    _refuse(dataset.offsets.diff() > room, dataset, name, reason, "Shorten them or raise it.")


def _refuse(
    is_bad: torch.Tensor, dataset: TokenDataset, name: str, reason: str, remedy: str
) -> None:
    """Raise RequestError that names samples by number, from 1, where a sequence is bad."""
    bad = is_bad.nonzero().view(-1).tolist()
    if not bad:
        return
    per_sample = 2 if dataset.kind == "preference" else 1
    numbers = sorted({index // per_sample + 1 for index in bad})
    named = ", ".join(str(number) for number in numbers[:MAX_NAMED])
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    raise RequestError(f"In the {name} samples {named}{more} {reason}. {remedy}")


def _digest(dataset: TokenDataset) -> str:
    """Of the training data: with others it would be another run."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (dataset.input_ids, dataset.loss_weights, dataset.offsets):
        digest.update(tensor.contiguous().numpy().data)
    digest.update(dataset.kind.encode())
    return digest.hexdigest()
