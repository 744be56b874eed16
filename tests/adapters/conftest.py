"""Bases, adapters that peft writes on them, and pools whose books are checked at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapters.format import read_ref
from engine.api import AdapterRef
from engine.config import LoraConfig, ModelConfig
from engine.lora_pool import LoraPool
from engine.weights import load_model
from tests.adapters.tiny_bases import BASES, Base, random_model, randomise


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], Base]:
    """A base by its name in BASES; made once."""
    made: dict[str, Base] = {}

    def get(kind: str) -> Base:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"base-{kind}")
            oracle = random_model(BASES[kind])
            oracle.save_pretrained(folder)
            loaded = load_model(ModelConfig(quantization="none"), folder, "cpu")
            made[kind] = Base(oracle, loaded.model, folder)
        return made[kind]

    return get


@pytest.fixture
def base(base_of) -> Base:
    return base_of("plain")


@pytest.fixture
def peft_adapter(tmp_path) -> Callable[..., tuple[Path, Any]]:
    """Write an adapter with peft: (folder, the peft model as it was saved)."""

    def write(
        oracle: Any, *, seed: int = 0, name: str = "adapter", **options: Any
    ) -> tuple[Path, Any]:
        options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
        model = peft.get_peft_model(copy.deepcopy(oracle), peft.LoraConfig(**options)).eval()
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return write


@pytest.fixture
def make_pool() -> Any:
    """A pool on a base; its books are checked when the test ends."""
    pools: list[LoraPool] = []

    def make(
        base: Base, load: Any = None, *, fingerprint: str | None = None, **config: Any
    ) -> LoraPool:
        def read(ref: AdapterRef) -> Any:
            return read_ref(ref, base.model.spec)

        pool = LoraPool(
            LoraConfig(**config),
            base.model,
            load or read,
            fingerprint=fingerprint,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.check_integrity()
        pool.close()
