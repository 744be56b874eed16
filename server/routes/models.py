"""GET /v1/models, GET and DELETE /v1/models/{model}: the base and its adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters.registry import AdapterRecord
from server.auth import require_admin
from server.errors import ApiError, json_response
from server.job_events import CHECKPOINT
from server.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base model under each of its names, then the adapters; checkpoints of fine-tuning only
    where they have been used."""
    state = state_of(request)
    cards = [_base_card(state, name) for name in state.model_names]
    cards += [_adapter_card(state, record) for record in state.registry.records()]
    loaded = set(state.registry.names())
    cards += [
        _sleeping_card(state, name)
        for name in state.adapters.fine_tuned
        if name not in loaded and CHECKPOINT not in name
    ]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> Response:
    """One model's card."""
    state = state_of(request)
    if _is_asleep(state, model):
        return json_response(_sleeping_card(state, model))
    record = state.find(model)
    card = _base_card(state, model) if record is None else _adapter_card(state, record)
    return json_response(card)


@router.delete("/v1/models/{model:path}", dependencies=[Depends(require_admin)])
async def delete_model(request: Request, model: str) -> Response:
    """Unload an adapter; a fine-tuned model is deleted for good."""
    state = state_of(request)
    if not _is_asleep(state, model) and state.find(model) is None:
        text = f"'{model}' is the base model, which cannot be deleted; adapters can."
        raise ApiError(400, text, code="invalid_value", param="model")
    if model in state.adapters.fine_tuned:
        await state.jobs.forget_model(model)
    else:
        await state.adapters.unload(model)
    return json_response({"id": model, "object": "model", "deleted": True})


def _base_card(state: ServerState, name: str) -> dict[str, Any]:
    return _card(state, name, state.created_at, root=state.base_path, parent=None)


def _adapter_card(state: ServerState, record: AdapterRecord) -> dict[str, Any]:
    card = _card(
        state,
        record.name,
        int(record.created_at),
        root=record.source,
        parent=state.model_names[0],
    )
    return card | {
        "generation": record.ref.generation,
        "has_score_head": record.info.has_score_head,
    }


def _is_asleep(state: ServerState, model: str) -> bool:
    """A fine-tuned model that nobody has used since the start."""
    return model in state.adapters.fine_tuned and model not in state.registry.names()


def _sleeping_card(state: ServerState, name: str) -> dict[str, Any]:
    folder = state.adapters.fine_tuned[name]
    try:
        created = int(folder.stat().st_mtime)
    except OSError:  # deleted behind our back; using it will say so
        created = 0
    card = _card(state, name, created, root=str(folder), parent=state.model_names[0])
    return card | {"has_score_head": _is_reward_adapter(folder)}


def _is_reward_adapter(folder: Path) -> bool:
    """What the folder of an adapter that nobody has loaded yet says of it."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("task_type") == "SEQ_CLS"


def _card(
    state: ServerState, name: str, created: int, *, root: str, parent: str | None
) -> dict[str, Any]:
    info = state.engine.info
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "herd",
        "root": root,
        "parent": parent,
        "max_model_len": info.max_model_len if info is not None else None,
    }
