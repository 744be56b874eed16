"""Models, adapters, tokens, scores, health, metrics."""

import asyncio
import json
import math
import re

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file
from transformers import LlamaConfig

from engine.api import EngineStats
from engine.errors import AdapterError
from engine.model_config import ModelSpec
from server.adapters import Adapters
from tests.server.fake_engine import add_adapter

USER = [{"role": "user", "content": "hi"}]


# --- models ---


async def test_models_are_the_base_and_its_adapters(client, state):
    add_adapter(state, "ada")
    cards = (await client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["base", "ada"]
    base, ada = cards
    assert (base["object"], base["parent"], base["root"]) == ("model", None, "/models/base")
    assert (ada["parent"], ada["root"], ada["generation"]) == ("base", "/adapters/ada", 1)
    assert base["max_model_len"] == ada["max_model_len"] == 512
    assert (await client.get("/v1/models/ada")).json() == ada


async def test_an_unknown_model_is_a_404(client):
    for path in ("/v1/models/nope", "/v1/models/a/b"):
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_every_served_name_is_a_model(client, state):
    state.model_names = ("base", "alias/with-slash")
    assert (await client.get("/v1/models/alias/with-slash")).json()["id"] == "alias/with-slash"


async def test_deleting_a_model_unloads_an_adapter_and_nothing_else(client, state):
    add_adapter(state, "ada")
    response = await client.delete("/v1/models/ada")
    assert response.json() == {"id": "ada", "object": "model", "deleted": True}
    assert state.registry.names() == ()
    assert (await client.delete("/v1/models/ada")).status_code == 404
    refused = await client.delete("/v1/models/base")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")


# --- adapters ---


@pytest.fixture
def folder(state, engine, tmp_path_factory):
    """A folder of adapters from which may be loaded, and a base that they fit."""
    base, shelf = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("shelf")
    LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(base)  # fmt: skip
    for name in ("ada", "bob"):
        config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
        (shelf / name).mkdir()
        (shelf / name / "adapter_config.json").write_text(json.dumps(config))
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{layer}.lora_A.weight": torch.ones(8, 64),
            f"{layer}.lora_B.weight": torch.ones(64, 8),
        }
        save_file(tensors, shelf / name / "adapter_model.safetensors")
    spec = ModelSpec.from_folder(base)
    adapters = Adapters(spec, engine, state.metrics, roots=[shelf], reserved_names=("base",))
    state.adapters, state.registry = adapters, adapters.registry
    yield shelf
    adapters.registry.close()


async def load(client, name, **fields):
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, **fields})


async def test_loading_answers_as_vllm_does(client, engine, folder):
    response = await load(client, "ada", lora_path=str(folder / "ada"))
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'ada' added successfully."
    assert response.headers["content-type"].startswith("text/plain")
    assert [(ref.name, pinned) for ref, pinned in engine.loaded] == [("ada", False)]
    assert (await client.get("/v1/models/ada")).status_code == 200


async def test_the_path_may_be_left_out_or_be_relative(client, folder):  # noqa: ARG001
    assert (await load(client, "ada")).status_code == 200
    assert (await load(client, "other", lora_path="bob")).status_code == 200


async def test_a_name_that_is_taken_needs_load_inplace(client, folder, state):  # noqa: ARG001
    await load(client, "ada")
    refused = await load(client, "ada")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_adapter")
    assert "load_inplace" in refused.json()["error"]["message"]
    again = await load(client, "ada", load_inplace=True)
    assert again.headers["x-herd-adapter-generation"] == "2"
    assert state.registry.resolve("ada").generations == (1, 2)


async def test_compare_and_swap(client, folder):  # noqa: ARG001
    assert (await load(client, "ada", expected_generation=1)).status_code == 409
    assert (await load(client, "ada", expected_generation=0)).status_code == 200
    body = {"load_inplace": True, "expected_generation": 1}
    assert (await load(client, "ada", **body)).status_code == 200
    conflict = await load(client, "ada", **body)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "generation_conflict")


@pytest.mark.parametrize("path", ["/etc", "../..", "nope", "ada/../../x", "\u0000", "a" * 5000])
async def test_paths_outside_the_folder_are_refused(client, folder, path):  # noqa: ARG001
    response = await load(client, "x", lora_path=path)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_adapter"


async def test_a_link_out_of_the_folder_is_refused(client, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "link").symlink_to(outside)
    assert (await load(client, "link")).status_code == 400


async def test_the_bases_name_is_taken(client, folder):  # noqa: ARG001
    response = await load(client, "base", lora_path="ada")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name")


async def test_what_the_engine_refuses_is_not_published(client, engine, folder, state):  # noqa: ARG001
    await load(client, "ada")
    engine.adapter_error = "NaN in layer 3"
    refused = await load(client, "ada", load_inplace=True)
    assert refused.status_code == 400
    assert "NaN in layer 3" in refused.json()["error"]["message"]
    assert state.registry.resolve("ada").ref.generation == 1


async def test_unloading(client, engine, folder, state):  # noqa: ARG001
    await load(client, "ada")
    response = await client.post("/v1/unload_lora_adapter", json={"lora_name": "ada"})
    assert response.text == "Success: LoRA adapter 'ada' removed successfully."
    await asyncio.sleep(0.01)
    assert [ref.name for ref in engine.unloaded] == ["ada"]
    again = await client.post("/v1/unload_lora_adapter", json={"lora_name": "ada"})
    assert (again.status_code, again.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_request_that_runs_keeps_its_unloaded_adapter(client, engine, folder):  # noqa: ARG001
    await load(client, "ada")
    engine.gate = asyncio.Event()
    body = {"model": "ada", "messages": USER}
    running = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
    while not engine.requests:
        await asyncio.sleep(0.01)
    await client.post("/v1/unload_lora_adapter", json={"lora_name": "ada"})
    await asyncio.sleep(0.01)
    assert engine.unloaded == []
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 404
    engine.gate.set()
    assert (await running).status_code == 200
    await asyncio.sleep(0.01)
    assert len(engine.unloaded) == 1


async def test_rollback(client, engine, folder):  # noqa: ARG001
    for _ in range(3):
        await load(client, "ada", load_inplace=True)
    first = await client.post("/v1/adapters/ada/rollback")
    assert (first.status_code, first.json()["generation"]) == (200, 2)
    chosen = await client.post("/v1/adapters/ada/rollback", json={"generation": 3})
    assert chosen.json()["generation"] == 3
    missing = await client.post("/v1/adapters/ada/rollback", json={"generation": 9})
    assert missing.status_code == 400
    assert (await client.post("/v1/adapters/nope/rollback")).status_code == 404
    bad = await client.post("/v1/adapters/ada/rollback", json={"generation": "x"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "generation")
    engine.adapter_error = "gone"
    assert (await client.post("/v1/adapters/ada/rollback")).status_code == 400
    assert (await client.get("/v1/adapters/ada")).json()["generation"] == 3


async def test_the_list_says_what_each_adapter_is_and_does(client, engine, folder, state):
    await load(client, "ada", pinned=True)
    await client.post("/v1/chat/completions", json={"model": "ada", "messages": USER})
    ref = state.registry.resolve("ada").ref
    engine.stats = EngineStats(resident_adapters=((ref.uid, ref.generation),))
    (entry,) = (await client.get("/v1/adapters")).json()["data"]
    shown = {name: entry[name] for name in ("name", "generation", "rank", "targets", "bytes")}
    assert shown == {
        "name": "ada", "generation": 1, "rank": 8, "targets": ["q_proj"],
        "bytes": (folder / "ada" / "adapter_model.safetensors").stat().st_size,
    }  # fmt: skip
    assert (entry["resident"], entry["pinned"], entry["requests_served"]) == (True, True, 1)
    assert entry["requests_running"] == 0


async def test_the_next_generation_frees_the_row_of_a_pinned_one(client, engine, folder):  # noqa: ARG001
    await load(client, "ada", pinned=True)
    await load(client, "ada", pinned=True, load_inplace=True)
    await asyncio.sleep(0.01)
    assert [ref.generation for ref in engine.unloaded] == [1]


async def test_a_new_worker_gets_the_current_generations(client, engine, folder, state):  # noqa: ARG001
    await load(client, "ada")
    await load(client, "ada", load_inplace=True, pinned=True)
    engine.loaded.clear()
    await state.adapters.reload_all()
    assert [(ref.generation, pinned) for ref, pinned in engine.loaded] == [(2, True)]


async def test_a_load_at_start_may_lie_anywhere(state, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in (folder / "ada").iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    await state.adapters.load_at_start("eve", elsewhere)
    assert state.registry.names() == ("eve",)
    with pytest.raises(AdapterError):
        await state.adapters.load_at_start("eve", elsewhere)


# --- tokens and scores ---


async def test_tokenize_and_detokenize(client):
    answer = (await client.post("/tokenize", json={"model": "base", "prompt": "hö"})).json()
    assert answer["tokens"] == [256, *"hö".encode()]
    assert (answer["count"], answer["max_model_len"]) == (4, 512)
    back = await client.post("/detokenize", json={"model": "base", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "<s>hö"}
    plain = {"prompt": "h", "add_special_tokens": False, "return_token_strs": True}
    assert (await client.post("/tokenize", json=plain)).json()["token_strs"] == ["h"]


async def test_a_conversation_is_tokenised_as_chat_sees_it(client, engine):
    tokens = (await client.post("/tokenize", json={"messages": USER})).json()["tokens"]
    await client.post("/v1/chat/completions", json={"model": "base", "messages": USER})
    assert tuple(tokens) == engine.requests[0].prompt_token_ids


@pytest.mark.parametrize("tokens", [[258], [-1], [1.5], ["a"], None])
async def test_tokens_that_do_not_exist_are_refused(client, tokens):
    response = await client.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
    ],
)
async def test_tokenize_refuses_what_a_chat_would_refuse(client, fields, param):
    response = await client.post("/tokenize", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_scores(client, state):
    add_adapter(state, "reward", has_score_head=True)
    body = {"model": "reward", "input": ["a", "b"]}
    response = await client.post("/v1/score", json=body)
    assert [entry["score"] for entry in response.json()["data"]] == [256 + 97.0, 256 + 98.0]
    assert response.headers["x-herd-adapter-generation"] == "1"
    one = (await client.post("/v1/score", json={"model": "reward", "input": "a"})).json()
    assert one["data"] == [{"index": 0, "object": "score", "score": 353.0}]
    assert one["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    for name in ("input", "messages"):
        chat = (await client.post("/v1/score", json={"model": "reward", name: USER})).json()
        assert chat["data"][0]["score"] == float(sum(b"<user>hi\n"))
    assert state.num_sequences == 0


async def test_scores_need_a_score_head(client, state):
    add_adapter(state, "chat")
    for model in ("base", "chat"):
        response = await client.post("/v1/score", json={"model": model, "input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_score_head")
    assert (await client.post("/v1/score", json={"model": "x", "input": "a"})).status_code == 404
    assert state.num_sequences == 0


# --- health and metrics ---


async def test_health_and_version(client):
    for response in (await client.get("/health"), await client.head("/health")):
        assert response.status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", (await client.get("/version")).json()["version"])


async def test_unknown_urls_and_methods_have_the_one_shape(client):
    for response in (
        await client.get("/v1/nope"), await client.get("/nope"), await client.put("/tokenize"),
        await client.get("/v1/chat/completions"),
    ):  # fmt: skip
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def metrics(client) -> dict:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (
            sample.name,
            sample.labels.get("adapter"),
            sample.labels.get("finished_reason"),
        ): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def test_metrics_are_counted_per_adapter(client, engine, state):
    add_adapter(state, "ada")
    engine.stats = EngineStats(
        num_running=3, kv_cache_usage=0.25, num_preemptions=2,
        num_drafts=5, num_draft_tokens=20, num_accepted_tokens=9,
    )  # fmt: skip
    body = {"messages": USER, "max_tokens": 4}
    await client.post("/v1/chat/completions", json={"model": "ada", **body})
    await client.post("/v1/chat/completions", json={"model": "base", **body, "n": 2})
    found = await metrics(client)
    assert found["herd_generation_tokens_total", "ada", None] == 4
    assert found["herd_generation_tokens_total", "", None] == 8
    assert found["herd_request_success_total", "ada", "length"] == 1
    assert found["herd_request_success_total", "", "length"] == 2
    assert found["herd_time_to_first_token_seconds_count", "ada", None] == 1
    assert found["herd_inter_token_latency_seconds_count", "ada", None] == 3
    assert found["herd_num_requests_running", None, None] == 3
    assert found["herd_kv_cache_usage_perc", None, None] == 0.25
    assert found["herd_num_preemptions_total", None, None] == 2
    assert found["herd_spec_decode_num_drafts_total", None, None] == 5
    assert found["herd_spec_decode_num_draft_tokens_total", None, None] == 20
    assert found["herd_spec_decode_num_accepted_tokens_total", None, None] == 9
    assert all(math.isfinite(value) for value in found.values())


async def test_metrics_tell_why_requests_ended(client, engine):
    body = {"model": "base", "messages": USER}
    await client.post("/v1/chat/completions", json={**body, "stop": "l"})
    engine.fail_after = 1
    await client.post("/v1/chat/completions", json=body)
    found = await metrics(client)
    assert found["herd_request_success_total", "", "stop"] == 1
    assert found["herd_request_success_total", "", "error"] == 1


async def test_answers_are_counted_by_route_and_status(client, engine):
    def broken(request):
        raise ZeroDivisionError(request)

    await client.get("/v1/models/base")
    await client.get("/v1/models/nope")
    await client.get("/never/heard/of")
    engine.answer = broken
    await client.post("/v1/completions", json={"model": "base", "prompt": "x"})
    text = (await client.get("/metrics")).text
    for method, route, status in (
        ("GET", "/v1/models/{model:path}", 200), ("GET", "/v1/models/{model:path}", 404),
        ("other", "other", 404), ("POST", "/v1/completions", 500),
    ):  # fmt: skip
        labels = f'{{method="{method}",route="{route}",status="{status}"}}'
        assert f"herd_http_requests_total{labels} 1.0" in text


async def test_adapters_that_are_loaded_are_shown(client, engine, state):
    ref = add_adapter(state, "ada")
    add_adapter(state, "bob")
    engine.stats = EngineStats(resident_adapters=((ref.uid, ref.generation),))
    found = await metrics(client)
    assert found["herd_adapter_resident", "ada", None] == 1
    assert found["herd_adapter_resident", "bob", None] == 0
    assert found["herd_adapter_requests_running", "ada", None] == 0


async def test_metrics_work_while_the_engine_loads(client, engine):
    engine.state = "loading"
    assert (await client.get("/metrics")).status_code == 200


async def test_adapter_loads_are_counted(client, folder):  # noqa: ARG001
    await load(client, "ada")
    found = await metrics(client)
    assert found["herd_adapter_load_seconds_count", "ada", None] == 1
    assert found["herd_adapter_generation", "ada", None] == 1
    await client.post("/v1/unload_lora_adapter", json={"lora_name": "ada"})
    assert ("herd_adapter_generation", "ada", None) not in await metrics(client)
