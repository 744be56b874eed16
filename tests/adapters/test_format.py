"""Broken, foreign and unsupported adapters are refused by name; what we write peft loads."""

import json
import struct

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import pattern_check
from adapters.folder import CHAT_TEMPLATE_FILE, CONFIG_FILE, TOKENIZER_CONFIG_FILE, WEIGHTS_FILE
from adapters.format import inspect_adapter, read_adapter
from adapters.writer import write_adapter
from engine.errors import AdapterError
from engine.lora import LoraModule, LoraWeights
from tests.adapters.tiny_bases import oracle_logits, random_model, ref_to, run, wait_until_placed

LAYER = "base_model.model.model.layers.0.self_attn"


@pytest.fixture
def folder(base, peft_adapter):
    return peft_adapter(base.oracle, task_type="CAUSAL_LM")[0]


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change, metadata=None):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)


def refusal(folder, base) -> str:
    with pytest.raises(AdapterError) as caught:
        inspect_adapter(folder, base.model.spec)
    return str(caught.value)


# What is reported.


def test_the_header_says_what_the_adapter_is(base, peft_adapter):
    folder, _ = peft_adapter(
        base.oracle,
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"up_proj": 9},
        task_type="CAUSAL_LM",
    )
    info = inspect_adapter(folder, base.model.spec)
    assert (info.rank, info.alpha, info.task_type) == (9, 6, "CAUSAL_LM")
    assert info.targets == ("lm_head", "q_proj", "up_proj")
    assert info.num_bytes == (folder / WEIGHTS_FILE).stat().st_size
    assert not info.has_score_head
    assert info.chat_template is None
    assert info.fingerprint is None
    assert not info.is_guanaco


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(\w+\.?)+#"},
        {"exclude_modules": r"(.+)+#"},
        {"rank_pattern": {"(.+)+#": 4}},
        {"modules_to_save": ["(.+)+#"]},
    ],
)
def test_a_regular_expression_that_would_stop_the_server_is_refused(
    base, folder, changes, monkeypatch
):
    monkeypatch.setattr(pattern_check, "TIMEOUT_S", 0.5)
    edit_config(folder, **changes)
    assert "takes too long to match" in refusal(folder, base)


def test_guanaco_is_recognised_by_label_or_base(folder, base):
    assert inspect_adapter(folder, base.model.spec, label="my-Guanaco").is_guanaco
    edit_config(folder, base_model_name_or_path="someone/guanaco-7b-merged")
    assert inspect_adapter(folder, base.model.spec).is_guanaco


def test_the_adapters_own_chat_template_is_found(folder, base):
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"chat_template": "from json"}))
    assert inspect_adapter(folder, base.model.spec).chat_template == "from json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps({"chat_template": named}))
    assert inspect_adapter(folder, base.model.spec).chat_template == "yes"
    (folder / CHAT_TEMPLATE_FILE).write_text("{{ messages }}")
    assert inspect_adapter(folder, base.model.spec).chat_template == "{{ messages }}"


def test_a_broken_tokenizer_config_is_an_adapter_error(folder, base):
    (folder / TOKENIZER_CONFIG_FILE).write_text("[" * 100_000)
    assert "tokenizer_config.json: not valid JSON" in refusal(folder, base)


# Files.


def test_a_missing_folder_is_named(base, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing", base)


def test_both_missing_files_are_named_at_once(base, tmp_path):
    message = refusal(tmp_path, base)
    assert "adapter_config.json is missing" in message
    assert "adapter_model.safetensors is missing" in message


def test_pickle_files_are_refused_by_name_and_never_read(folder, base):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    message = refusal(folder, base)
    assert "adapter_model.bin: pickle files can run code" in message
    assert "save it again" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -3])
def test_truncated_weights_are_refused(folder, base, keep):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:keep])
    assert "truncated or damaged" in refusal(folder, base)


def test_a_header_that_claims_to_be_huge_is_refused(folder, base):
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "truncated or damaged" in refusal(folder, base)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[1]", "holds a list, expected an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"peft_type": "LOHA"}', "found 'LOHA'; only 'LORA' is served"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, base, text, expected):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    assert expected in refusal(folder, base)


# Options.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("fan_in_fan_out", True),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"a": 1}),
        ("an_option_of_tomorrow", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "tomorrow"),
        ("task_type", "TOKEN_CLS"),
        ("bias", "some"),
        ("r", 0),
        ("r", "8"),
        ("r", 2.5),
        ("lora_alpha", -1),
        ("lora_alpha", True),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("lora_alpha", float("nan")),
        ("use_dora", "no"),
        ("use_rslora", 1),
        ("target_modules", [1]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "["),
        ("rank_pattern", {"(": 4}),
        ("layers_to_transform", ["a"]),
        ("modules_to_save", {"a": 1}),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(folder, base, option, value):
    edit_config(folder, **{option: value})
    assert option in refusal(folder, base)


def test_every_option_of_the_installed_peft_is_known():
    from dataclasses import fields

    from adapters.peft_options import HONOURED, REFUSED, TRAINING_ONLY

    known = HONOURED | TRAINING_ONLY | REFUSED.keys()
    assert {field.name for field in fields(peft.LoraConfig)} <= known


def test_dora_with_lora_bias_is_refused(folder, base):
    edit_config(folder, use_dora=True, lora_bias=True)
    assert "use_dora and lora_bias" in refusal(folder, base)


# Tensors.


def test_an_adapter_of_another_architecture_matches_nothing(folder, base):
    def rename(tensors):
        for key in list(tensors):
            tensors["base_model.model.transformer.h.0.attn.c_attn" + key[key.index(".lora") :]] = (
                tensors.pop(key)
            )

    edit_tensors(folder, rename)
    assert "no module of the adapter matches this base" in refusal(folder, base)


def test_wrong_shapes_are_named_with_found_and_expected(folder, base):
    def change(tensors):
        tensors[f"{LAYER}.q_proj.lora_A.weight"] = torch.ones(4, 40)
        tensors[f"{LAYER}.v_proj.lora_B.weight"] = torch.ones(99, 4)

    edit_tensors(folder, change)
    message = refusal(folder, base)
    assert "layers.0.self_attn.q_proj.lora_A.weight: shape [4, 40], expected [4, 32]" in message
    assert "layers.0.self_attn.v_proj.lora_B.weight: shape [99, 4], expected [16, 4]" in message


def test_a_rank_that_disagrees_with_the_config_is_named(folder, base):
    edit_config(folder, r=5)
    message = refusal(folder, base)
    assert (
        "q_proj.lora_A.weight: shape [4, 32], expected [5, 32]; adapter_config.json says rank 5"
        in message
    )


@pytest.mark.parametrize(("missing", "other"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_pair_is_refused(folder, base, missing, other):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.q_proj.{missing}.weight"))
    assert f"layers.0.self_attn.q_proj: {other} has no {missing} beside it" in refusal(folder, base)


def test_a_targeted_layer_without_tensors_is_refused(folder, base):
    def change(tensors):
        tensors.pop(f"{LAYER}.q_proj.lora_A.weight")
        tensors.pop(f"{LAYER}.q_proj.lora_B.weight")

    edit_tensors(folder, change)
    assert "modules without tensors in the file: model.layers.0.self_attn.q_proj" in refusal(
        folder, base
    )


def test_tensors_that_the_config_does_not_target_are_refused(folder, base):
    edit_config(folder, target_modules=["q_proj"])
    assert "that target_modules does not name: model.layers.0.self_attn.v_proj" in refusal(
        folder, base
    )


def test_layers_that_do_not_exist_are_refused(folder, base):
    def change(tensors):
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.ones(
            4, 32
        )

    edit_tensors(folder, change)
    assert "mean nothing to this base: base_model.model.model.layers.7" in refusal(folder, base)


@pytest.mark.parametrize(
    "name", ["extra", f"{LAYER}.q_proj.lora_C.weight", "base_model.model.model.norm.weight"]
)
def test_unexpected_tensors_are_refused(folder, base, name):
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(32)}))
    assert f"mean nothing to this base: {name}" in refusal(folder, base)


def test_integer_tensors_are_refused(folder, base):
    key = f"{LAYER}.q_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    assert f"{key}: dtype I8" in refusal(folder, base)


def test_target_modules_that_match_nothing_are_named(folder, base):
    edit_config(folder, target_modules=["c_attn"])
    assert "target_modules matches no module of this base: found c_attn" in refusal(folder, base)


def test_a_resized_vocabulary_is_refused_with_the_reason(base, peft_adapter):
    folder, _ = peft_adapter(base.oracle, modules_to_save=["lm_head", "embed_tokens"])

    def change(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.ones(64, 32)
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(64, 32)

    edit_tensors(folder, change)
    message = refusal(folder, base)
    assert (
        "lm_head.weight: shape [64, 32], expected [61, 32]; the base's vocabulary has 61 tokens"
        in message
    )
    assert "merge it with peft" in message


def test_saved_norms_are_refused(base, peft_adapter):
    folder, _ = peft_adapter(base.oracle, modules_to_save=["norm"])
    assert "modules_to_save: 'norm' is not a module that can be replaced" in refusal(folder, base)


def test_a_saved_module_that_is_missing_is_refused(folder, base):
    edit_config(folder, modules_to_save=["lm_head"])
    assert "modules_to_save names modules without tensors in the file: lm_head" in refusal(
        folder, base
    )


def test_a_bias_that_the_base_does_not_have_is_refused(folder, base):
    edit_tensors(folder, lambda t: t.update({f"{LAYER}.q_proj.base_layer.bias": torch.ones(32)}))
    assert "q_proj.base_layer.bias: this base has no bias there" in refusal(folder, base)


def test_a_reward_adapter_without_its_head_is_refused(folder, base):
    edit_config(folder, task_type="SEQ_CLS")
    assert "score.weight, the score head, is missing" in refusal(folder, base)


def test_a_classifier_with_several_labels_is_refused(folder, base):
    edit_config(folder, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    edit_tensors(folder, lambda t: t.update({"base_model.model.score.weight": torch.ones(3, 32)}))
    assert "score.weight: shape [3, 32], expected [1, 32]; score heads have one output" in refusal(
        folder, base
    )


def test_dora_without_magnitudes_is_refused(folder, base):
    edit_config(folder, use_dora=True)
    assert "use_dora is set and lora_magnitude_vector is missing" in refusal(folder, base)


def test_magnitudes_without_dora_are_refused(base, peft_adapter):
    folder, _ = peft_adapter(base.oracle, use_dora=True)
    edit_config(folder, use_dora=False)
    assert "lora_magnitude_vector is there and use_dora is not set" in refusal(folder, base)


def test_every_problem_is_in_one_error(folder, base):
    edit_config(folder, use_qalora=True, init_lora_weights="pissa")
    edit_tensors(
        folder,
        lambda t: t.update(
            {f"{LAYER}.q_proj.lora_A.weight": torch.ones(4, 40), "x": torch.ones(1)}
        ),
    )
    message = refusal(folder, base)
    for part in ("use_qalora", "pissa", "expected [4, 32]", "mean nothing to this base: x"):
        assert part in message


def test_a_long_list_of_problems_is_cut(folder, base):
    def change(tensors):
        for key in tensors:
            tensors[key] = torch.ones(1, 1)

    edit_config(folder, target_modules="all-linear")
    edit_tensors(folder, change)
    assert len(refusal(folder, base).splitlines()) < 30


# Values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_tensor(folder, base, value):
    key = f"{LAYER}.v_proj.lora_A.weight"

    def change(tensors):
        tensors[key][1, 3] = value

    edit_tensors(folder, change)
    inspect_adapter(folder, base.model.spec)  # the header is in order
    with pytest.raises(AdapterError, match=f"NaN or infinite values in {key}"):
        read_adapter(folder, base.model.spec)


def test_an_untrained_adapter_is_refused(folder, base):
    def change(tensors):
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensor.zero_()

    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match="changes nothing: every lora_B is zero"):
        read_adapter(folder, base.model.spec)


def test_an_untrained_embedding_adapter_is_refused(base, peft_adapter):
    folder, _ = peft_adapter(base.oracle, target_modules=["embed_tokens"])

    def change(tensors):
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"].zero_()

    edit_tensors(folder, change)
    with pytest.raises(AdapterError, match="changes nothing"):
        read_adapter(folder, base.model.spec)


# What other tools and older versions write.


def test_a_config_without_target_modules_takes_what_the_file_has(folder, base):
    edit_config(folder, target_modules=None)
    assert inspect_adapter(folder, base.model.spec).targets == ("q_proj", "v_proj")


def test_the_sparse_config_of_an_old_peft_is_read(folder, base):
    (folder / CONFIG_FILE).write_text(
        json.dumps(
            {
                "base_model_name_or_path": "huggyllama/llama-7b",
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "init_lora_weights": True,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "modules_to_save": None,
                "peft_type": "LORA",
                "r": 4,
                "target_modules": ["q_proj", "v_proj"],
                "task_type": "CAUSAL_LM",
            }
        )
    )
    weights = read_adapter(folder, base.model.spec)
    tensors = load_file(folder / WEIGHTS_FILE)
    found = weights.modules["model.layers.0.self_attn.q_proj"].b
    assert torch.equal(found, tensors[f"{LAYER}.q_proj.lora_B.weight"] * 4)


# Writing.


def random_weights(base, *, dora: bool = False, fingerprint: str | None = "abc") -> LoraWeights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    shapes = base.model.spec.linear_shapes()
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.down_proj": 4, "lm_head": 2}
    modules = {
        path: LoraModule(
            a=random(rank, shapes[path][1]),
            b=random(shapes[path][0], rank),
            magnitude=random(shapes[path][0]).abs() + 1 if dora else None,
        )
        for path, rank in ranks.items()
    }
    return LoraWeights(modules=modules, base_fingerprint=fingerprint)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 8}, {"alpha": 5.5, "use_rslora": True}, {"dora": True}]
)
def test_peft_loads_what_we_write_and_gives_our_logits(base, tmp_path, make_pool, options):
    options = dict(options)
    weights = random_weights(base, dora=options.pop("dora", False))
    write_adapter(tmp_path / "a", weights, base_model="tiny", **options)
    oracle = peft.PeftModel.from_pretrained(random_model({}), tmp_path / "a").eval()
    pool = make_pool(base)
    row = wait_until_placed(pool, ref_to(tmp_path / "a"))
    torch.testing.assert_close(
        torch.cat(run(base, pool, [row] * 3)),
        torch.cat(oracle_logits(oracle)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_we_write_we_read_back(base_of, tmp_path):
    base = base_of("tied")
    weights = random_weights(base)
    replaced = {"model.embed_tokens.weight": torch.randn(61, 32)}
    weights = LoraWeights(modules=weights.modules, replaced=replaced, base_fingerprint="abc")
    write_adapter(tmp_path, weights, base_model=None, alpha=16, chat_template="{{ messages }}")
    info = inspect_adapter(tmp_path, base.model.spec)
    assert (info.fingerprint, info.chat_template, info.rank) == ("abc", "{{ messages }}", 4)
    found = read_adapter(tmp_path, base.model.spec)
    assert found.modules.keys() == weights.modules.keys()
    for path, module in weights.modules.items():
        assert torch.equal(found.modules[path].a, module.a)
        torch.testing.assert_close(found.modules[path].b, module.b)
    assert torch.equal(
        found.replaced["model.embed_tokens.weight"], replaced["model.embed_tokens.weight"]
    )


def test_a_reward_adapter_is_written_with_its_head(base, tmp_path):
    head = torch.randn(1, 32)
    weights = LoraWeights(modules=random_weights(base).modules, replaced={"score.weight": head})
    modules = {path: module for path, module in weights.modules.items() if path != "lm_head"}
    weights = LoraWeights(modules=modules, replaced=weights.replaced)
    write_adapter(tmp_path, weights, base_model=None, task_type="SEQ_CLS")
    assert inspect_adapter(tmp_path, base.model.spec).has_score_head
    assert torch.equal(read_adapter(tmp_path, base.model.spec).replaced["score.weight"], head)
