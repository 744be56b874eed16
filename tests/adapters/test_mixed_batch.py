"""Several adapters in one batch, each as if alone, to the bit; scales, scores, stored copies."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.folder import WEIGHTS_FILE
from adapters.format import inspect_adapter, read_adapter
from engine.errors import AdapterError
from tests.adapters.tiny_bases import (
    BASES,
    oracle_logits,
    random_model,
    ref_to,
    run,
    wait_until_placed,
)

MIXED = [
    {"target_modules": "all-linear", "r": 8},
    {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_dora": True},
    {"target_modules": ["k_proj"], "r": 1, "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 5},
]


@pytest.fixture
def mixed(base, peft_adapter, make_pool):
    """A pool with the four adapters above in rows 0..3, and peft's models of them."""
    pool = make_pool(base, max_loras=4)
    oracles = []
    for uid, options in enumerate(MIXED, 1):
        folder, oracle = peft_adapter(base.oracle, seed=uid, name=f"a{uid}", **options)
        assert wait_until_placed(pool, ref_to(folder, uid)) == uid - 1
        oracles.append(oracle)
    return pool, oracles


def test_each_adapter_in_a_mixed_batch_gives_pefts_logits(base, mixed):
    pool, oracles = mixed
    prompts = [[3, 9, 27, 20], [4, 4, 5], [50, 1, 7, 8, 9], [6, 5, 4, 3, 2], [12, 13]]
    actual = run(base, pool, [0, 1, 2, 3, -1], prompts=prompts)
    for found, oracle, prompt in zip(actual, [*oracles, base.oracle], prompts, strict=True):
        torch.testing.assert_close(found, oracle_logits(oracle, [prompt])[0], rtol=1e-4, atol=1e-4)


def test_an_adapters_tokens_have_the_same_bits_alone_and_among_others(base, mixed):
    pool, _ = mixed
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, 61, (n,), generator=generator).tolist() for n in (5, 19, 1, 9, 4, 16, 2)
    ]
    rows = [0, 1, 2, 3, -1, 1, 0]
    scales = [1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.25]
    together = run(base, pool, rows, scales, prompts)
    for index, prompt in enumerate(prompts):
        alone = run(base, pool, [rows[index]], [scales[index]], [prompt])[0]
        assert torch.equal(together[index], alone), f"prompt {index} on row {rows[index]}"


def test_base_tokens_are_untouched_by_their_neighbours_adapters(base, mixed):
    pool, _ = mixed
    beside = run(base, pool, [0, -1, 2])[1]
    assert torch.equal(beside, run(base, pool, [-1, -1, -1])[1])


def test_scale_zero_is_the_base_to_the_bit(base, mixed):
    pool, _ = mixed
    expected = run(base, pool, [-1, -1, -1])
    for row in range(4):
        for found, wanted in zip(run(base, pool, [row] * 3, [0.0] * 3), expected, strict=True):
            assert torch.equal(found, wanted)


def test_scale_multiplies_the_effect_of_a_plain_adapter(base, peft_adapter, make_pool):
    folder, _ = peft_adapter(base.oracle, lora_alpha=6)
    tripled, oracle = peft_adapter(base.oracle, lora_alpha=18, name="tripled")
    assert tripled != folder
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(folder))
    actual = run(base, pool, [row] * 3, [3.0] * 3)
    torch.testing.assert_close(
        torch.cat(actual), torch.cat(oracle_logits(oracle)), rtol=1e-4, atol=1e-4
    )


def test_select_keeps_the_adapters_of_the_chosen_tokens(base, mixed):
    pool, _ = mixed
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    lora = pool.batch([0, 3, -1, 2, 3, -1], [1.0, 1.0, 1.0, 0.5, 2.0, 1.0])
    with torch.inference_mode():
        every = base.model.logits(hidden, lora)
        chosen = base.model.logits(hidden[[4, 3, 2]], lora.select([4, 3, 2]))
    assert torch.equal(chosen, every[[4, 3, 2]])
    assert lora.select([2, 5]) is None
    assert pool.batch([-1, -1], [1.0, 1.0]) is None


def test_score_head_gives_transformers_reward(base, peft_adapter, make_pool):
    classifier = random_model({}, "SequenceClassification")
    classifier.model.load_state_dict(base.oracle.model.state_dict())
    folder, oracle = peft_adapter(classifier, task_type="SEQ_CLS", target_modules="all-linear")
    assert inspect_adapter(folder, base.model.spec).has_score_head
    pool = make_pool(base)
    ref = ref_to(folder)
    row = wait_until_placed(pool, ref)
    assert pool.has_score_head(ref)
    prompt = [3, 17, 4, 59, 8]
    hidden = []
    original = base.model.logits
    base.model.logits = lambda found, lora: hidden.append(found) or original(found, lora)
    try:
        run(base, pool, [row], prompts=[prompt])
    finally:
        del base.model.logits
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits.item()
    assert pool.score(row, hidden[0][-1]).item() == pytest.approx(expected, abs=1e-4)


def test_an_adapter_without_score_head_refuses_to_score(mixed):
    pool, _ = mixed
    with pytest.raises(AdapterError, match=r"'a1' has no score head"):
        pool.score(0, torch.zeros(32))


def test_a_stored_copy_of_the_base_costs_nothing(base, peft_adapter, make_pool):
    folder, _ = peft_adapter(base.oracle, target_modules=["lm_head"])
    assert any(
        key.endswith("lm_head.base_layer.weight") for key in load_file(folder / WEIGHTS_FILE)
    )
    pool = make_pool(base)
    wait_until_placed(pool, ref_to(folder))
    assert pool._rows.placed[0]["lm_head"].dense is None


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_a_stored_copy_that_differs_replaces_the_base_as_in_peft(
    kind, base_of, peft_adapter, make_pool
):
    base = base_of(kind)
    folder, _ = peft_adapter(base.oracle, target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] *= 1.5
    save_file(tensors, folder / WEIGHTS_FILE)
    oracle = peft.PeftModel.from_pretrained(random_model(BASES[kind]), folder).eval()
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(folder))
    torch.testing.assert_close(
        torch.cat(run(base, pool, [row] * 3)),
        torch.cat(oracle_logits(oracle)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_16_bit_are_read(base, peft_adapter, dtype):
    folder, _ = peft_adapter(base.oracle)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    weights = read_adapter(folder, base.model.spec)
    module = weights.modules["model.layers.0.self_attn.q_proj"]
    assert module.a.dtype is dtype
    assert module.b.dtype is torch.float32  # the scale is folded in without rounding
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(module.b, tensors[key].float() * (6 / 4))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
