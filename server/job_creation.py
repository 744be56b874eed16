"""A new job: everything is checked that can be, what it names is copied, and it becomes a row."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import time
from pathlib import Path

import sqlalchemy as sa

from adapters.registry import AdapterRecord
from engine.api import EngineInfo
from server.fine_tuning_schemas import CreateJobRequest, ReinforcementMethod
from server.hyperparameters import config_to_json, train_config
from server.job_checks import check_file, check_reward_model, fit_config
from server.job_data import REWARD, START, Workshop, freeze_adapter, save_template
from server.job_store import ORGANIZATION, add_event, new_id
from server.metric_sinks import check_integrations
from server.tables import insert, jobs
from server.uploads import disk_error

MAX_BASE_CHARS = 24


async def create_job(
    shop: Workshop, body: CreateJobRequest, start: AdapterRecord | None, info: EngineInfo
) -> str:
    """Make a job whose data are to be checked next; its id.

    Args:
        start: the adapter that body.model names; None is the base.

    Raises:
        ApiError, EngineError: it cannot be run as it is; nothing is left of it.
    """
    method = body.chosen_method()
    given = method.hyperparameters()
    seed = body.seed if body.seed is not None else random.SystemRandom().randrange(2**31)
    config, _ = train_config(method.type, given, seed=seed)
    config = fit_config(
        config,
        given,
        path=f"method.{method.type}.hyperparameters",
        start=start,
        spec=shop.spec,
        info=info,
        max_lora_rank=shop.max_lora_rank,
        has_validation=body.validation_file is not None,
    )
    reward = await _reward_model(shop, method.reinforcement)
    await check_file(shop.files, body.training_file, "training_file")
    await check_file(shop.files, body.validation_file, "validation_file")
    integrations = [item.model_dump() for item in body.integrations or []]
    check_integrations(integrations)
    job_id = new_id("ftjob")
    values = {
        "id": job_id,
        "created_at": int(time.time()),
        "status": "validating_files",
        "is_paused": False,
        "base_fingerprint": info.base_fingerprint,
        "model": body.model,
        "reward_model": reward.name if reward is not None else None,
        "method": method.type,
        "suffix": body.suffix,
        "seed": seed,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "hyperparameters": given,
        "config": config_to_json(config),
        "metadata": body.metadata,
        "integrations": integrations,
        "model_name": model_name(shop.model_names[0], body.suffix, job_id),
        "step": 0,
        "num_deaths": 0,
    }

    def work(connection: sa.Connection) -> None:
        insert(connection, jobs, **values)
        add_event(connection, job_id, f"Created fine-tuning job: {job_id}")
        add_event(connection, job_id, f"Validating training file: {body.training_file}")

    folder = shop.folder.job(job_id)
    try:
        await _freeze(shop, folder, start, reward)
        await shop.database.write(work)
    except BaseException as error:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, folder) from error
        raise
    return job_id


def model_name(base: str, suffix: str | None, job_id: str) -> str:
    """What a job's result is called: ft:base:organization:suffix:id, of characters that names of
    adapters may have."""
    parts = (base[:MAX_BASE_CHARS], ORGANIZATION, suffix or "", job_id[-8:])
    return "ft:" + ":".join(re.sub(r"[^A-Za-z0-9._-]", "-", part) for part in parts)


async def _reward_model(shop: Workshop, method: ReinforcementMethod | None) -> AdapterRecord | None:
    if method is None:
        return None
    name, adapters = method.grader.model or "", shop.adapters
    await adapters.wake(name)
    record = adapters.registry.resolve(name) if name in adapters.registry.names() else None
    return check_reward_model(record, name, "method.reinforcement.grader.model")


async def _freeze(
    shop: Workshop, folder: Path, start: AdapterRecord | None, reward: AdapterRecord | None
) -> None:
    """Copy what the job names into its folder, while nobody can take it away."""
    registry = shop.adapters.registry
    for part, record in ((START, start), (REWARD, reward)):
        if record is not None:
            ref = registry.acquire(record.name)
            try:
                await asyncio.to_thread(freeze_adapter, Path(ref.path), folder, part)
            finally:
                registry.release(ref)
    await asyncio.to_thread(save_template, shop, start, folder)
