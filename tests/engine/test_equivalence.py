"""The whole engine against transformers, on tiny random models of each architecture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from engine.api import (
    AdapterRef,
    GenerateRequest,
    GrammarSpec,
    LoadAdapter,
    RequestDelta,
    SamplingParams,
)
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig, SchedulerConfig
from engine.decode_graphs import DecodeGraphs
from engine.engine import Engine
from engine.lora import LoraModule, LoraWeights
from engine.startup import create_engine
from tests.engine.test_decode_graphs import Recorder
from tests.engine.tiny_models import save_model

ARCHITECTURES = ("llama", "llama3_tied", "mistral_window", "qwen2", "qwen3")
AS_SERVED = {"quantization": "nf4", "dtype": "bfloat16"}
PROMPTS = [
    [int(token) for token in torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n))]
    for n in (23, 1, 9, 40, 5, 17, 30, 2, 11, 8, 19, 3, 26, 14, 7, 33, 12)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and transformers model by architecture."""
    made = {}
    for name in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, save_model(folder, name))
    return made


def make_engine(folder: Path, **flags) -> Engine:
    """An engine on the CPU; flags of the scheduler and the cache by name."""
    scheduler = {
        "max_num_seqs": 20,
        "max_num_batched_tokens": 256,
        "speculative_config": None,
        "enforce_eager": False,
        "async_scheduling": "auto",
    }
    cache: dict[str, object] = {"block_size": 4}
    max_loras = flags.pop("max_loras", 2)
    model = {"quantization": "none", **flags.pop("model", {})}
    for name, value in flags.items():
        (scheduler if name in scheduler else cache)[name] = value
    config = EngineConfig(
        model=ModelConfig(
            base=str(folder),
            **{"device": "cpu", "quantized_cache_dir": f"{folder}-4bit", **model},
        ),
        cache=CacheConfig(**cache),
        scheduler=SchedulerConfig(**scheduler),
        lora=LoraConfig(max_loras=max_loras),
    )
    return create_engine(config, folder, random_adapter, lambda *_: None)[0]


def random_adapter(ref: AdapterRef) -> LoraWeights:
    """Rank uid + generation, on two of tiny Llama's layers; strong enough to change the text."""
    generator = torch.Generator().manual_seed(10 * ref.uid + ref.generation)

    def module(out_features: int, in_features: int) -> LoraModule:
        rank = ref.uid + ref.generation
        return LoraModule(
            a=0.3 * torch.randn(rank, in_features, generator=generator),
            b=0.3 * torch.randn(out_features, rank, generator=generator),
        )

    modules = {
        "model.layers.0.self_attn.q_proj": module(64, 64),
        "model.layers.1.mlp.down_proj": module(64, 112),
    }
    return LoraWeights(modules=modules)


def run(engine: Engine, requests: list[GenerateRequest]) -> dict[str, list[RequestDelta]]:
    for request in requests:
        engine.add(request)
    deltas: dict[str, list[RequestDelta]] = {request.request_id: [] for request in requests}
    while engine.has_work():
        for delta in engine.step().deltas:
            deltas[delta.request_id].append(delta)
        engine.check_integrity()
    errors = [found[-1].error for found in deltas.values() if found[-1].error is not None]
    assert errors == []
    return deltas


def request(number: int, num_tokens: int = 24, adapter=None, scale=1.0, **params):
    params = {"temperature": 0.0, "ignore_eos": True, **params}
    return GenerateRequest(
        request_id=f"r{number}",
        prompt_token_ids=tuple(PROMPTS[number]),
        params=SamplingParams(max_tokens=num_tokens, **params),
        adapter=adapter,
        lora_scale=scale,
    )


def seeded(number: int) -> GenerateRequest:
    return request(number, temperature=0.9, top_p=0.95, seed=1000 + number)


def texts(deltas: dict[str, list[RequestDelta]]) -> dict[str, list[int]]:
    return {name: [t for d in found for t in d.token_ids] for name, found in deltas.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_that_of_transformers_generate(models, name):
    folder, oracle = models[name]
    found = texts(run(make_engine(folder), [request(i) for i in range(4)]))
    for number in range(4):
        prompt = torch.tensor([PROMPTS[number]])
        expected = oracle.generate(
            prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert found[f"r{number}"] == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_through_the_paged_cache_is_a_full_recomputation(models, name):
    """Log-probabilities step by step against one pass of transformers over the final text."""
    folder, oracle = models[name]
    asked = request(0, logprobs=3, prompt_logprobs=2)
    deltas = run(make_engine(folder, max_num_batched_tokens=20), [asked])["r0"]
    output = [token for delta in deltas for token in delta.token_ids]
    with torch.inference_mode():
        logits = oracle(torch.tensor([PROMPTS[0] + output])).logits[0].float()
    expected = logits.log_softmax(dim=-1)
    reported = [*deltas[0].prompt_logprobs, *(d.logprobs[0] for d in deltas)]
    assert len(reported) == len(PROMPTS[0]) + len(output) and reported[0] is None
    for position, entry in enumerate(reported[1:]):
        assert entry.token_id == (PROMPTS[0] + output)[position + 1]
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=2e-5)
        values, ids = expected[position].topk(len(entry.top))
        assert [token_id for token_id, _ in entry.top] == ids.tolist()
        assert [v for _, v in entry.top] == pytest.approx(values.tolist(), abs=2e-5)


@pytest.mark.parametrize("make", [request, seeded], ids=["greedy", "seeded"])
@pytest.mark.parametrize("model", [{}, AS_SERVED], ids=["float32", "nf4-bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_request_says_the_same_alone_and_among_sixteen_others(models, name, model, make):
    folder, _ = models[name]
    together = texts(run(make_engine(folder, model=model), [make(i) for i in range(17)]))
    for number in (0, 1, 16):
        assert texts(run(make_engine(folder, model=model), [make(number)])) == {
            f"r{number}": together[f"r{number}"]
        }


@pytest.mark.parametrize("model", [{}, AS_SERVED], ids=["float32", "nf4-bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole_prompt_to_the_bit(models, name, model):
    folder, _ = models[name]
    asked = [request(3, logprobs=5, prompt_logprobs=1)]
    whole = run(make_engine(folder, model=model), asked)["r3"]
    budget = {"max_num_seqs": 1, "max_num_batched_tokens": 7}
    chunked = run(make_engine(folder, model=model, **budget), asked)["r3"]
    assert [d.token_ids for d in whole] == [d.token_ids for d in chunked]
    assert [d.logprobs for d in whole] == [d.logprobs for d in chunked]
    assert whole[0].prompt_logprobs == chunked[0].prompt_logprobs


@pytest.mark.parametrize("make", [request, seeded], ids=["greedy", "seeded"])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_preempted_request_says_what_it_says_undisturbed(models, make, enable_prefix_caching):
    folder, _ = models["llama"]
    asked = [make(i) for i in (0, 2, 5, 6)]
    bytes_per_block = 2 * 2 * 4 * 2 * 16 * 4  # k and v, layers, tokens, heads, head_dim, float32
    tight = make_engine(
        folder,
        kv_cache_memory_bytes=34 * bytes_per_block,
        enable_prefix_caching=enable_prefix_caching,
    )
    found = texts(run(tight, asked))
    assert tight.scheduler.num_preemptions > 0
    assert found == texts(run(make_engine(folder), asked))


def test_a_text_from_the_prefix_cache_is_the_same_text(models):
    folder, _ = models["llama"]
    engine = make_engine(folder)
    first = run(engine, [request(3)])["r3"]
    second = run(engine, [request(3)])["r3"]
    assert first[0].num_cached_tokens == 0 and second[0].num_cached_tokens == 36
    assert [d.token_ids for d in first] == [d.token_ids for d in second]


def test_a_16_bit_cache_serves_a_32_bit_model(models):
    folder, _ = models["llama"]
    engine = make_engine(folder, kv_cache_dtype="bfloat16")
    assert engine._runner.kv_caches[0][0].dtype == torch.bfloat16
    exact = texts(run(make_engine(folder), [request(2)]))["r2"]
    assert texts(run(engine, [request(2)]))["r2"][0] == exact[0]


def test_an_8_bit_cache_says_the_same_alone_in_a_batch_in_chunks_and_from_the_prefix(models):
    folder, oracle = models["llama"]
    asked = [request(i, 12) for i in range(6)] + [seeded(6)]
    engine = make_engine(folder, kv_cache_dtype="fp8")
    assert engine._runner.kv_caches[0][0].dtype == torch.float8_e4m3fn
    found = texts(run(engine, asked))
    again = texts(run(engine, asked))
    small = make_engine(folder, kv_cache_dtype="fp8", max_num_batched_tokens=7, max_num_seqs=3)
    assert texts(run(small, asked)) == again == found
    prompt = torch.tensor([PROMPTS[0]])
    exact = oracle.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found["r0"][0] == exact[0, prompt.shape[1]].item()


def test_adapters_mixed_in_a_batch_and_more_of_them_than_rows_say_what_each_says_alone(models):
    folder, _ = models["llama"]
    refs = [
        AdapterRef(uid=uid, generation=generation, name=f"a{uid}", path="")
        for uid, generation in ((1, 1), (1, 2), (2, 1), (3, 1), (4, 1))
    ]
    choices = [(None, 1.0), *((ref, scale) for ref in refs for scale in (1.0, 0.5))]
    asked = [request(number, 12, *choices[number % len(choices)]) for number in range(len(PROMPTS))]
    mixed = texts(run(make_engine(folder, max_loras=2), asked))
    plain = texts(run(make_engine(folder), [request(1, 12)]))
    assert mixed["r1"] != plain["r1"], "the adapters must have an effect"
    engine = make_engine(folder, max_loras=2)
    for one in asked:
        assert texts(run(engine, [one])) == {one.request_id: mixed[one.request_id]}
    assert engine._pool.num_evictions > 0


def test_a_scale_of_zero_is_the_base(models):
    folder, _ = models["llama"]
    ref = AdapterRef(uid=1, generation=1, name="a", path="")
    engine = make_engine(folder)
    off = texts(run(engine, [request(2, adapter=ref, scale=0.0)]))
    assert off == texts(run(engine, [request(2)]))


def test_a_pinned_adapter_stays_while_others_come_and_go(models):
    folder, _ = models["llama"]
    engine = make_engine(folder, max_loras=2)
    refs = [AdapterRef(uid=uid, generation=1, name=f"a{uid}", path="") for uid in range(1, 6)]
    engine.adapters.load(LoadAdapter(command_id=1, ref=refs[0], pinned=True))
    replies = []
    while not replies:
        engine.step()
        replies = engine.adapters.take_replies()
    assert replies[0].error is None and replies[0].num_bytes > 0
    for number, ref in enumerate(refs[1:]):
        run(engine, [request(number, 4, adapter=ref)])
        assert (1, 1) in engine._pool.resident


def test_a_regular_expression_is_followed_token_by_token(models):
    folder, _ = models["llama"]
    letters = save_letters(folder)
    engine = make_engine(folder)
    grammar = GrammarSpec(kind="regex", source="[ab]{3}c[0-9]{2,4}")
    asked = [
        request(number, 20, grammar=grammar, ignore_eos=False, temperature=1.0, seed=number)
        for number in range(6)
    ]
    found = run(engine, [*asked, request(9)])
    for number in range(6):
        deltas = found[f"r{number}"]
        assert deltas[-1].finish_reason == "stop"
        tokens = [letters[t] for d in deltas for t in d.token_ids if t != 2]
        assert re.fullmatch("[ab]{3}c[0-9]{2,4}", "".join(tokens))
    assert texts(found)["r9"] == texts(run(engine, [request(9)]))["r9"]


def save_letters(folder: Path) -> list[str]:
    """A tokenizer of one character per token; returns its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(94))]
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return letters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_what_the_cpu_says(models):
    """float32 on both; also sizes the cache from the device's memory."""
    folder, _ = models["llama"]
    asked = [request(number) for number in range(6)]
    engine = make_engine(folder, model={"device": "cuda"})
    assert engine._runner.kv_caches[0][0].is_cuda
    assert texts(run(engine, asked)) == texts(run(make_engine(folder), asked))


@pytest.mark.parametrize("model", [{}, AS_SERVED], ids=["float32", "nf4-bfloat16"])
def test_guessed_tokens_and_steps_launched_ahead_change_nothing_to_the_bit(models, model):
    """Greedy and drawn, with adapters, log-probabilities, penalties and too few blocks."""
    folder, _ = models["llama"]
    refs = [AdapterRef(uid=uid, generation=1, name=f"a{uid}", path="") for uid in (1, 2)]
    asked = [
        *(request(number, 40) for number in range(4)),
        *(request(number, 30, adapter=refs[number % 2], logprobs=2) for number in range(4, 8)),
        *(dataclasses.replace(seeded(number), adapter=refs[number % 2]) for number in range(8, 12)),
        *(request(number, 30, temperature=0.4, seed=1, logprobs=0) for number in range(12, 15)),
        request(15, 30, repetition_penalty=1.1, presence_penalty=0.2),
    ]
    config = '{"num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}'
    bytes_per_token = 2 * 2 * 2 * 16 * (2 if model else 4)  # k and v, layers, heads, head_dim
    answers = []
    for flags in ({}, {"async_scheduling": "on"}, {"speculative_config": config}):
        engine = make_engine(
            folder, model=model, kv_cache_memory_bytes=300 * bytes_per_token, **flags
        )
        found = run(engine, asked)
        logprobs = {
            name: [entry for delta in deltas for entry in delta.logprobs or ()]
            for name, deltas in found.items()
        }
        answers.append((texts(found), logprobs))
        assert engine.scheduler.num_preemptions > 0
    assert answers[0] == answers[1] == answers[2]
    assert engine.scheduler.speculation.num_accepted_tokens > 20


def test_guessed_tokens_and_steps_launched_ahead_follow_a_real_grammar(models):
    folder, _ = models["llama"]
    save_letters(folder)
    grammar = GrammarSpec(kind="regex", source="(ab)+c(de){3,9}f")
    asked = [
        request(number, 40, grammar=grammar, ignore_eos=False, temperature=1.0, seed=number)
        for number in range(6)
    ]
    config = '{"num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}'
    plain = run(make_engine(folder), asked)
    engine = make_engine(folder, speculative_config=config)
    ahead = make_engine(folder, async_scheduling="on")
    for found in (run(engine, asked), run(ahead, asked)):
        assert texts(found) == texts(plain)
        assert [d[-1].finish_reason for d in found.values()] == [
            d[-1].finish_reason for d in plain.values()
        ]
    assert engine.scheduler.speculation.num_accepted_tokens > 10


@pytest.mark.parametrize("guessing", [False, True], ids=["plain", "guessing"])
def test_recorded_decode_steps_say_what_others_say(models, guessing):
    """The real model, pool and attention; a backend that records on the CPU."""
    folder, _ = models["llama"]
    refs = [AdapterRef(uid=uid, generation=1, name=f"a{uid}", path="") for uid in (1, 2)]
    choices = [(None, 1.0), (refs[0], 1.0), (refs[1], 0.5), (refs[1], 0.0)]
    asked = [request(n, 20 + n, *choices[n % 4], logprobs=1) for n in range(7)]
    plain = run(make_engine(folder), asked)
    config = '{"num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}'
    engine = make_engine(folder, speculative_config=config if guessing else None)
    runner, backend = engine._runner, Recorder()
    runner._graphs = DecodeGraphs(
        runner.model,
        runner.kv_caches,
        runner.lora_pool,
        backend,
        sizes=(1, 2, 4, 8, 32),
        block_size=4,
        max_num_blocks=64,
        device=torch.device("cpu"),
    )
    found = run(engine, asked)
    assert texts(found) == texts(plain)
    for name, deltas in plain.items():
        expected = [entry for d in deltas for entry in d.logprobs]
        assert [entry for d in found[name] for entry in d.logprobs] == expected
    assert backend.num_replayed > 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("model", [{}, AS_SERVED], ids=["float32", "nf4-bfloat16"])
def test_recorded_steps_of_a_gpu_and_those_launched_ahead_give_the_bits_of_others(models, model):
    folder, _ = models["llama"]
    refs = [AdapterRef(uid=uid, generation=1, name=f"a{uid}", path="") for uid in (1, 2, 3)]
    # So narrow a 4-bit model multiplies with the library, whose bits depend on the number of rows:
    # there must be as many as are recorded.
    count, growth = (8, 0) if model else (7, 1)
    asked = [
        request(n, 40 + growth * n, adapter=(None, *refs[:2])[n % 3], logprobs=1)
        for n in range(count)
    ]
    later = [request(n, 40, adapter=(None, refs[2])[n % 2], logprobs=1) for n in range(8, 16)]
    found = []
    for enforce_eager, mode in ((True, "off"), (True, "on"), (False, "off"), (False, "on")):
        flags = {"enforce_eager": enforce_eager, "async_scheduling": mode}
        engine = make_engine(folder, model={**model, "device": "cuda"}, **flags)
        deltas = run(engine, asked) | run(engine, later)  # between them the pool changes
        found.append({name: [d.logprobs for d in answer] for name, answer in deltas.items()})
        assert found[-1] == found[0], flags
    assert set(engine._runner._graphs._replays) >= {8}, "nothing was recorded, or not again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "recorded"])
def test_a_step_of_a_gpu_waits_for_nothing_but_the_tokens_of_the_one_before(models, enforce_eager):
    folder, _ = models["llama"]
    engine = make_engine(folder, model={"device": "cuda"}, enforce_eager=enforce_eager)
    ref = AdapterRef(uid=1, generation=1, name="a1", path="")
    asked = [request(0, 60), seeded(1), request(2, 60, adapter=ref, logprobs=2), request(3, 60)]
    for one in asked:
        engine.add(dataclasses.replace(one, params=dataclasses.replace(one.params, max_tokens=60)))
    for _ in range(20):  # prompts, what is compiled, what is recorded
        engine.step()
    torch.cuda.set_sync_debug_mode("error")  # an event is no such wait
    try:
        outputs = [engine.step() for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine._in_flight is not None
    assert all(len(output.deltas) == len(asked) for output in outputs)
    assert not any(delta.finish_reason for output in outputs for delta in output.deltas)
    engine.cancel_all()
    engine.step()
