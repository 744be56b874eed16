"""From a job to everything that its first step needs: data, adapter, optimizer, where it stands."""

from __future__ import annotations

from collections.abc import Callable

from engine.api import AdapterRef, TrainingJob
from engine.errors import RequestError
from engine.lora import LoraWeights
from engine.memory import available_host_bytes, check_memory
from engine.model import CausalLM
from engine.train.adapter import TrainableAdapter
from engine.train.checkpoint import TrainerState
from engine.train.config import TrainConfig
from engine.train.data_checks import check_data, check_lengths, data_digest
from engine.train.defaults import resolve
from engine.train.objectives import make_objective
from engine.train.optimizer import AdamW
from engine.train.resume import resume
from engine.train.run import Run
from engine.train.targets import target_paths
from engine.train.token_dataset import load_dataset


def prepare(
    job: TrainingJob,
    model: CausalLM,
    *,
    base_fingerprint: str,
    max_model_len: int,
    load_adapter: Callable[[AdapterRef], LoraWeights],
) -> tuple[Run, list[str]]:
    """Read and check the data, make the adapter, and go to where the newest checkpoint stands.

    Args:
        job:              what to train.
        model:            the base.
        base_fingerprint: the base's.
        max_model_len:    tokens that the base is served with.
        load_adapter:     reads an adapter from disk.

    Returns:
        (the run, what the job's owner should know).

    Raises:
        EngineError: the data, the settings or an adapter cannot be used; every reason is named.
    """
    dataset = load_dataset(job.data_path)
    validation = load_dataset(job.validation_path) if job.validation_path is not None else None
    check_data(job.config, dataset, "training data")
    if validation is not None:
        check_data(job.config, validation, "validation data")
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
            check_lengths(data, config, name)
    _check_host_memory(config, model)
    adapter = TrainableAdapter.create(model.spec, config, model.device)
    reference = load_adapter(job.reference) if job.reference is not None else None
    assert config.micro_batch_tokens is not None
    run = Run(
        job=job,
        model=model,
        dataset=dataset,
        validation=validation,
        adapter=adapter,
        optimizer=AdamW(adapter.groups, config),
        objective=make_objective(config, reference, model.device),
        state=TrainerState(
            config=config,
            base_fingerprint=base_fingerprint,
            data_digest=data_digest(dataset),
            micro_batch_tokens=config.micro_batch_tokens,
        ),
    )
    notes: list[str] = []
    if not resume(run, notes) and job.start_from is not None:
        adapter.load_weights(load_adapter(job.start_from))
    return run, notes


def _check_job(job: TrainingJob) -> None:
    problems = []
    if job.config.early_stopping_patience is not None and job.validation_path is None:
        problems.append("early_stopping_patience needs validation data to wait for")
    if job.config.method == "grpo" and job.reward_adapter is None:
        problems.append("grpo needs a reward adapter that says what an answer is worth")
    if job.reference is not None and job.config.method not in ("dpo", "grpo"):
        problems.append(f"a reference is of no use to the method {job.config.method}")
    if job.reward_adapter is not None and job.config.method != "grpo":
        problems.append(f"a reward adapter is of no use to the method {job.config.method}")
    if problems:
        raise RequestError("This job cannot run: " + "; ".join(problems) + ".")


def _check_host_memory(config: TrainConfig, model: CausalLM) -> None:
    """Refuse an adapter that the host has no room for. A GPU says no by itself; on the host the
    worker would be killed, and the streams with it.

    Raises:
        NotEnoughMemory: it has none.
    """
    shapes = model.spec.linear_shapes()
    paths = target_paths(model.spec, config.target_modules)
    numel = config.rank * sum(sum(shapes[path]) for path in paths)
    num_bytes = 4 * numel  # the copy that checkpoints are written from
    if model.device.type == "cpu":
        num_bytes += 8 * numel  # masters and gradients
    if model.device.type == "cpu" or config.paged:
        num_bytes += numel * (2 if config.optimizer == "adamw_8bit" else 8)
    check_memory(
        f"An adapter of rank {config.rank} with its gradients and optimizer",
        num_bytes,
        available_host_bytes(),
        where="memory",
        remedy="Lower rank, or name fewer target_modules.",
    )
