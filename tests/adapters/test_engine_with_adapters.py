"""From peft's files to text: registry, loader, pool, scheduler and model together, against peft."""

import functools
from pathlib import Path

import pytest
import torch

from adapters.format import read_ref
from adapters.registry import Registry
from engine.api import AdapterRef, GenerateRequest, SamplingParams
from engine.config import CacheConfig, EngineConfig, LoraConfig, ModelConfig
from engine.startup import create_engine
from tests.adapters.tiny_bases import (
    oracle_logits,
    random_model,
    ref_to,
    run,
    wait_until_placed,
)

PROMPTS = [tuple(range(3, 3 + n)) for n in (5, 17, 1, 9, 30)]
NUM_TOKENS = 12
KINDS = [
    {"target_modules": "all-linear", "r": 8},
    {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.fixture
def make_engine(base):
    engines = []

    def make(**lora):
        config = EngineConfig(
            model=ModelConfig(base="x", quantization="none", device="cpu"),
            cache=CacheConfig(block_size=4),
            lora=LoraConfig(**lora),
        )
        load = functools.partial(read_ref, spec=base.model.spec)
        engine, _ = create_engine(config, base.folder, load, lambda *_: None)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def registry(base, tmp_path):
    registry = Registry(base.model.spec, folder=tmp_path)
    yield registry
    registry.close()


def generate(engine, requests: list[GenerateRequest]) -> dict[str, list]:
    for request in requests:
        engine.add(request)
    deltas = {request.request_id: [] for request in requests}
    while engine.has_work():
        for delta in engine.step().deltas:
            deltas[delta.request_id].append(delta)
        engine.check_integrity()
    return deltas


def request(
    name: str, prompt: tuple[int, ...], ref: AdapterRef | None, **fields
) -> GenerateRequest:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return GenerateRequest(
        request_id=name, prompt_token_ids=prompt, params=params, adapter=ref, **fields
    )


def expected_text(oracle, prompt: tuple[int, ...]) -> list[int]:
    with torch.inference_mode():
        out = oracle.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_loras", [1, 4])
def test_greedy_text_of_many_adapters_is_that_of_peft(
    base, peft_adapter, registry, make_engine, max_loras
):
    engine = make_engine(max_loras=max_loras, max_cpu_loras=4)
    oracles = [(None, base.oracle)]
    for index, options in enumerate(KINDS):
        folder, oracle = peft_adapter(base.oracle, seed=index, name=f"a{index}", **options)
        registry.publish(f"a{index}", folder)
        oracles.append((f"a{index}", oracle))
    requests, expected = [], {}
    for number, prompt in enumerate(PROMPTS):
        for name, oracle in oracles:
            ref = registry.acquire(name) if name is not None else None
            requests.append(request(f"{name} {number}", prompt, ref))
            expected[f"{name} {number}"] = expected_text(oracle, prompt)
    found = generate(engine, requests)
    texts = {name: [t for d in deltas for t in d.token_ids] for name, deltas in found.items()}
    assert texts == expected
    assert len(set(map(tuple, expected.values()))) > len(PROMPTS)  # the adapters do something


def test_reward_scores_are_those_of_transformers(base, peft_adapter, registry, make_engine):
    classifier = random_model({}, "SequenceClassification")
    classifier.model.load_state_dict(base.oracle.model.state_dict())
    folder, oracle = peft_adapter(classifier, task_type="SEQ_CLS", target_modules="all-linear")
    ref = registry.publish("reward", folder).ref
    requests = [request(str(n), p, ref, task="score") for n, p in enumerate(PROMPTS)]
    found = generate(make_engine(), requests)
    for number, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = oracle(input_ids=torch.tensor([prompt])).logits.item()
        assert found[str(number)][-1].score == pytest.approx(expected, abs=1e-4)


def test_a_generation_whose_files_are_broken_fails_its_request_only(
    base, peft_adapter, registry, make_engine
):
    folder, _ = peft_adapter(base.oracle)
    good, bad = registry.publish("good", folder).ref, registry.publish("bad", folder).ref
    (Path(bad.path) / "adapter_model.safetensors").write_bytes(b"not weights")
    found = generate(
        make_engine(), [request("good", PROMPTS[0], good), request("bad", PROMPTS[0], bad)]
    )
    assert found["good"][-1].finish_reason == "length"
    assert found["bad"][-1].error.code == "invalid_adapter"
    assert "truncated or damaged" in found["bad"][-1].error.message


def test_weights_survive_the_file_they_came_from(base, peft_adapter, make_pool):
    # Tensors read from a file must not be views of it.
    folder, oracle = peft_adapter(base.oracle, target_modules="all-linear")
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(folder))
    weights_file = folder / "adapter_model.safetensors"
    weights_file.write_bytes(b"\0" * weights_file.stat().st_size)
    torch.testing.assert_close(
        torch.cat(run(base, pool, [row] * 3)),
        torch.cat(oracle_logits(oracle)),
        rtol=1e-4,
        atol=1e-4,
    )
