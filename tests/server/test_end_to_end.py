"""HTTP down to the weights: a tiny random LLaMA with adapters, against transformers and peft."""

import contextlib
import functools
import json
import os
import signal
import threading
from types import SimpleNamespace

import httpx
import openai
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from adapters.format import read_ref
from adapters.writer import write_trained
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.model_config import ModelSpec
from server.adapters import Adapters
from server.config import ServerConfig
from server.data_folder import DataFolder
from server.database import Database
from server.datasets.prepare import prepare
from server.engine_client import EngineClient
from server.feedback import Feedback
from server.files import Files
from server.job_data import Workshop
from server.jobs import Jobs
from server.metrics import Metrics
from server.state import ServerState
from server.tokenizer import load_tokenizer
from tests.engine.tiny_models import save_model
from tests.server.live import connect, request_bytes, serving, wait_until

VOCAB = 300
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.0}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}


def save_tokenizer(folder):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]  # ids 0, 1, 2 as the tiny models have them
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(["hello world, the answer is"] * 5, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)


def save_adapters(folder, model, base_folder):
    """`ada` for chat, `judge` with a score head; random, so that they change much."""

    def randomise(adapted):
        torch.manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "score" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.3)

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    ada = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    randomise(ada)
    ada.save_pretrained(folder / "ada")
    judged = LlamaForSequenceClassification.from_pretrained(base_folder, num_labels=1)
    judge = peft.get_peft_model(judged, peft.LoraConfig(task_type="SEQ_CLS", **options))
    randomise(judge)
    judge.save_pretrained(folder / "judge")
    return ada.eval(), judge.eval()


@pytest.fixture(scope="module")
def herd(tmp_path_factory):
    """A server with a real worker, and the oracles."""
    folder = tmp_path_factory.mktemp("base")
    shelf = tmp_path_factory.mktemp("shelf")
    model = save_model(folder, "llama", vocab_size=VOCAB, max_position_embeddings=1024)
    save_tokenizer(folder)
    ada, judge = save_adapters(shelf, model, folder)

    spec = ModelSpec.from_folder(folder)
    config = EngineConfig(
        model=ModelConfig(base=str(folder), quantization="none", device="cpu"),
        cache=CacheConfig(kv_cache_memory_bytes=2**24),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256),
    )
    write = functools.partial(write_trained, base_model="tiny")
    engine = EngineClient(config, folder, functools.partial(read_ref, spec=spec), write)
    metrics = Metrics("tiny")
    adapters = Adapters(spec, engine, metrics, roots=[shelf], reserved_names=["tiny"])
    engine.on_restart = adapters.reload_all
    tokenizer = load_tokenizer(folder)
    data = DataFolder(tmp_path_factory.mktemp("data"))
    database = Database(data.database_url())
    files = Files(database, data)
    shop = Workshop(
        database=database,
        folder=data,
        files=files,
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        spec=spec,
        prepare=prepare,
        model_names=("tiny",),
    )
    state = ServerState(
        config=ServerConfig(),
        engine=engine,
        registry=adapters.registry,
        adapters=adapters,
        tokenizer=tokenizer,
        model_names=("tiny",),
        base_path=str(folder),
        max_num_seqs=16,
        metrics=metrics,
        files=files,
        feedback=Feedback(database, files, is_on=True),
        jobs=Jobs(shop),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        await state.jobs.start(await engine.start())
        yield
        await state.jobs.stop()
        await engine.stop(0.0)

    with serving(state, lifespan) as port:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as http:
            for name in ("ada", "judge"):
                loaded = http.post("/v1/load_lora_adapter", json={"lora_name": name})
                assert loaded.status_code == 200, loaded.text
            yield SimpleNamespace(
                http=http, url=url, port=port, state=state, engine=engine, ada=ada, judge=judge
            )
    adapters.registry.close()


def chat(herd, model="tiny", **fields):
    response = herd.http.post("/v1/chat/completions", json={"model": model, **CHAT, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def oracle(herd, model):
    """The transformers model, with or without the adapter."""
    context = herd.ada.disable_adapter() if model == "tiny" else contextlib.nullcontext()
    return context, herd.ada


@pytest.mark.parametrize("model", ["tiny", "ada"])
def test_greedy_chat_is_what_transformers_generates(herd, model):
    prompt = herd.state.tokenizer.encode("<user>hello<assistant>", add_special_tokens=False)
    context, reference = oracle(herd, model)
    with context, torch.inference_mode():
        ids = reference.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )[0, len(prompt) :].tolist()
    expected = herd.state.tokenizer.decode(ids, skip_special_tokens=True)
    answer = chat(herd, model, max_tokens=24)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize("model", ["tiny", "ada"])
def test_logprobs_of_a_scored_prompt_are_transformers(herd, model):
    text = "hello, is the world the answer?"
    body = {"model": model, "prompt": text, "echo": True, "max_tokens": 0, "logprobs": 3}
    found = herd.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    ids = herd.state.tokenizer.encode(text, add_special_tokens=True)
    context, reference = oracle(herd, model)
    with context, torch.inference_mode():
        logits = reference(input_ids=torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(found["token_logprobs"][1:]), expected, atol=2e-4, rtol=0
    )
    assert "".join(found["tokens"]) == text
    assert all(len(top) >= 3 for top in found["top_logprobs"][1:])


def test_scores_are_pefts(herd):
    texts = ["hello world", "the answer", "no"]
    body = {"model": "judge", "input": texts}
    scores = [entry["score"] for entry in herd.http.post("/v1/score", json=body).json()["data"]]
    with torch.inference_mode():
        expected = [
            herd.judge(
                input_ids=torch.tensor([herd.state.tokenizer.encode(text, add_special_tokens=True)])
            ).logits.item()
            for text in texts
        ]
    assert scores == pytest.approx(expected, abs=2e-4)


def test_streams_are_equal_to_plain_answers_under_load(herd):
    """Twelve at once, base and adapter mixed, seeded: each equals itself alone."""

    def ask(index, stream):
        model = ("tiny", "ada")[index % 2]
        fields = {"temperature": 1.0, "seed": index, "max_tokens": 30, "stop": ["e", "zz"]}
        if not stream:
            return chat(herd, model, **fields)["choices"][0]["message"]["content"]
        with openai.OpenAI(base_url=f"{herd.url}/v1", api_key="none") as client:
            fields |= {"messages": CHAT["messages"], "stream": True}
            chunks = client.chat.completions.create(model=model, **fields)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = [ask(index, stream=False) for index in range(12)]
    together = [""] * 12

    def run(index):
        together[index] = ask(index, stream=True)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(set(alone)) > 1


def test_a_scale_of_zero_is_the_base(herd):
    base = chat(herd, max_tokens=16)["choices"][0]["message"]["content"]
    zero = chat(herd, "ada", max_tokens=16, lora_scale=0.0)["choices"][0]["message"]["content"]
    full = chat(herd, "ada", max_tokens=16)["choices"][0]["message"]["content"]
    assert zero == base != full


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_cannot_fail_even_on_a_random_model(herd, seed):
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": 200,
    }
    choice = chat(herd, **fields)["choices"][0]
    value = json.loads(choice["message"]["content"])
    assert isinstance(value["ok"], bool)
    assert value["kind"] in ("a", "b")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_a_required_tool_cannot_fail_even_on_a_random_model(herd, seed):
    fields = {
        "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
        "temperature": 1.0, "seed": seed, "max_tokens": 200,
    }  # fmt: skip
    choice = chat(herd, **fields)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "pick"
    assert json.loads(call["function"]["arguments"])["kind"] in ("a", "b")
    assert choice["finish_reason"] == "tool_calls"


def test_a_choice_is_one_of_those_offered(herd):
    fields = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 1.0, "seed": 1}
    assert chat(herd, **fields)["choices"][0]["message"]["content"] in ("yes", "no")


def test_a_repeated_prompt_comes_from_the_cache(herd):
    body = {"model": "tiny", "prompt": "hello world " * 20, "max_tokens": 1, "temperature": 0}
    first, second = (herd.http.post("/v1/completions", json=body).json() for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["choices"][0]["text"] == first["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_ends_the_work_in_the_engine(herd, stream):
    body = {
        "model": "ada", "prompt": "hello", "max_tokens": 900, "ignore_eos": True, "stream": stream,
    }  # fmt: skip
    connection = connect(herd.port)
    connection.sendall(request_bytes("/v1/completions", json.dumps(body).encode()))
    wait_until(lambda: herd.engine.stats.num_running == 1)
    connection.close()
    wait_until(lambda: herd.state.num_sequences == 0)
    wait_until(lambda: herd.engine.stats.num_running == 0)


def test_a_reload_answers_from_the_new_generation(herd):
    before = chat(herd, "ada", max_tokens=8)
    body = {"lora_name": "ada", "load_inplace": True}
    assert herd.http.post("/v1/load_lora_adapter", json=body).status_code == 200
    after = chat(herd, "ada", max_tokens=8)
    assert before["system_fingerprint"].endswith("_g1")
    assert after["system_fingerprint"].endswith("_g2")
    assert before["choices"] == after["choices"]  # the same weights
    back = herd.http.post("/v1/adapters/ada/rollback")
    assert back.json()["generation"] == 1
    assert chat(herd, "ada", max_tokens=8)["system_fingerprint"].endswith("_g1")
    entry = herd.http.get("/v1/adapters/ada").json()
    assert entry["resident"]
    assert entry["requests_running"] == 0


def test_a_dead_worker_is_one_clear_error_and_then_service_again(herd):
    """The last test: it kills the worker in mid-stream."""
    expected = chat(herd, "ada", max_tokens=8)["choices"]
    body = {
        "model": "ada", "prompt": "hello", "max_tokens": 900, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    blocks = []
    with herd.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                blocks.append(json.loads(line.removeprefix("data: ")))
            if len(blocks) == 2:
                os.kill(herd.engine._worker.process.pid, signal.SIGKILL)
    assert blocks[-1]["error"]["code"] == "engine_restarting"
    assert sum("error" in block for block in blocks) == 1
    unhealthy = herd.http.get("/health")
    assert (unhealthy.status_code, unhealthy.json()["error"]["code"]) == (503, "engine_restarting")
    assert unhealthy.headers["retry-after"]
    wait_until(lambda: herd.http.get("/health").status_code == 200, timeout_s=60)
    assert chat(herd, "ada", max_tokens=8)["choices"] == expected
    assert herd.state.num_sequences == 0
