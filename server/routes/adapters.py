"""Loading and unloading adapters, as vLLM's clients do it, and what vLLM has not: a list, and
rollback."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from adapters.registry import AdapterRecord
from server.auth import require_admin
from server.errors import json_response
from server.limits import body_of
from server.message_schemas import Body, Text
from server.state import ServerState, state_of

router = APIRouter()
ADMIN = [Depends(require_admin)]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:\-]{0,127}$")]


class LoadAdapterRequest(Body):
    lora_name: AdapterName
    lora_path: Annotated[Text, Field(min_length=1)] | None = None
    load_inplace: bool | None = None
    pinned: bool | None = None
    expected_generation: Annotated[int, Field(ge=0)] | None = None
    """Load only if this generation is current; 0: only if there is no adapter of that name."""


class UnloadAdapterRequest(Body):
    lora_name: str
    lora_int_id: Any = None
    """vLLM's clients may send it; names are enough here."""


class RollbackRequest(Body):
    generation: Annotated[int, Field(ge=1)] | None = None


LoadBody = Annotated[LoadAdapterRequest, Depends(body_of(LoadAdapterRequest))]
UnloadBody = Annotated[UnloadAdapterRequest, Depends(body_of(UnloadAdapterRequest))]


@router.post("/v1/load_lora_adapter", dependencies=ADMIN)
async def load_adapter(request: Request, body: LoadBody) -> Response:
    """Load an adapter, or with load_inplace the next generation of one."""
    record = await state_of(request).adapters.load(
        body.lora_name,
        body.lora_path,
        load_inplace=bool(body.load_inplace),
        pinned=bool(body.pinned),
        expected_generation=body.expected_generation,
    )
    return PlainTextResponse(
        f"Success: LoRA adapter '{record.name}' added successfully.", headers=_headers(record)
    )


@router.post("/v1/unload_lora_adapter", dependencies=ADMIN)
async def unload_adapter(request: Request, body: UnloadBody) -> Response:
    """Forget an adapter; requests that run finish on it."""
    await state_of(request).adapters.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter with what it is and how it is used."""
    state = state_of(request)
    records = [_describe(state, record) for record in state.registry.records()]
    return json_response({"object": "list", "data": records})


@router.get("/v1/adapters/{name}")
async def retrieve_adapter(request: Request, name: str) -> Response:
    """One adapter."""
    state = state_of(request)
    return json_response(_describe(state, state.registry.resolve(name)))


@router.post("/v1/adapters/{name}/rollback", dependencies=ADMIN)
async def rollback_adapter(request: Request, name: str) -> Response:
    """Make an older generation current again: the one before, or the one that the body names."""
    state = state_of(request)
    has_body = bool(await request.body())
    body = await body_of(RollbackRequest)(request) if has_body else RollbackRequest()
    record = await state.adapters.rollback(name, body.generation)
    return json_response(_describe(state, record), headers=_headers(record))


def _headers(record: AdapterRecord) -> dict[str, str]:
    return {"X-Herd-Adapter-Generation": str(record.ref.generation)}


def _describe(state: ServerState, record: AdapterRecord) -> dict[str, Any]:
    resident = (record.ref.uid, record.ref.generation) in state.engine.stats.resident_adapters
    return {
        "id": record.name,
        "object": "adapter",
        "name": record.name,
        "generation": record.ref.generation,
        "generations": list(record.generations),
        "rank": record.info.rank,
        "alpha": record.info.alpha,
        "targets": list(record.info.targets),
        "bytes": record.info.num_bytes,
        "task_type": record.info.task_type,
        "has_score_head": record.info.has_score_head,
        "base_model": record.info.base_model,
        "source": record.source,
        "created": int(record.created_at),
        "resident": resident,
        "pinned": record.pinned,
        "requests_served": record.num_requests,
        "requests_running": record.num_running,
    }
