"""Every option of peft's LoraConfig: honoured, of training only, refused when set, or a way to
initialise.

An option in none of them is refused when it is set, so that a newer peft's is never ignored in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HONOURED = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "lora_bias",
    "use_dora",
    "init_lora_weights",
    "ensure_weight_tying",
}
TRAINING_ONLY = {
    "lora_dropout",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "revision",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
}
REFUSED = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "a router chooses among several adapters (Arrow)",
    "fan_in_fan_out": "weights are stored transposed, as in GPT-2",
    "kasa_config": "the base's weights were truncated and a diagonal is learned (KaSA)",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "layers are Megatron's parallel ones",
    "monteclora_config": "weights are sampled (MonteCLoRA)",
    "target_parameters": "bare parameters are adapted, not linear layers",
    "trainable_token_indices": "single embedding rows are trained",
    "use_bdlora": "matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "inputs are pooled in groups (QA-LoRA)",
    "velora_config": "training compressed the activations (VeLoRA)",
}
# peft's own remedy for these is to convert while saving; the file then has init_lora_weights true.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_INIT = ("gaussian", "orthogonal", "eva", "mica")
TASK_TYPES = (None, "CAUSAL_LM", "SEQ_CLS")
BIAS_KINDS = ("none", "lora_only", "all")


def unsupported_options(fields: Mapping[str, Any]) -> list[str]:
    """What adapter_config.json asks for that cannot be honoured, one problem per option."""
    problems = [
        f"{name}: {reason}; this is not supported"
        for name, reason in REFUSED.items()
        if _is_set(fields.get(name))
    ]
    problems += [
        f"{name}: unknown option, set to {shorten(fields[name])}; it cannot be ignored safely"
        for name in sorted(fields.keys() - HONOURED - TRAINING_ONLY - REFUSED.keys())
        if _is_set(fields[name])
    ]
    problems += _unsupported_init(fields.get("init_lora_weights", True))
    task_type, bias = fields.get("task_type"), fields.get("bias", "none")
    if task_type not in TASK_TYPES:
        problems.append(
            f"task_type: found {shorten(task_type)}; served are CAUSAL_LM and SEQ_CLS (score heads)"
        )
    if bias not in BIAS_KINDS:
        problems.append(f"bias: found {shorten(bias)}; allowed are {', '.join(BIAS_KINDS)}")
    if fields.get("use_dora") and fields.get("lora_bias"):
        problems.append("use_dora and lora_bias are both set; peft does not define what that is")
    return problems


def _unsupported_init(init: object) -> list[str]:
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INIT):
        return [
            f"init_lora_weights: {init!r} changed the base's weights when training began. Save it "
            f"again with peft's path_initial_model_for_weight_conversion; or, if this base is the "
            f"changed one, set init_lora_weights to true"
        ]
    if init is None or isinstance(init, bool) or init in PLAIN_INIT:
        return []
    return [
        f"init_lora_weights: unknown value {shorten(init)}; it may have changed the base's weights"
    ]


def shorten(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_set(value: object) -> bool:
    return value not in (None, False, "", [], {})
