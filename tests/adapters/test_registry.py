"""Names, uids, generations: what is current, held and freed, and what survives its folder."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.folder import WEIGHTS_FILE
from adapters.format import read_adapter
from adapters.registry import Registry
from engine.errors import AdapterError, AdapterNotFound


@pytest.fixture
def folder(base, peft_adapter):
    return peft_adapter(base.oracle)[0]


@pytest.fixture
def freed():
    return []


@pytest.fixture
def registry(base, freed, tmp_path):
    registry = Registry(base.model.spec, on_freed=freed.append, folder=tmp_path)
    yield registry
    registry.close()


def test_each_load_of_a_name_is_the_next_generation_of_one_uid(registry, folder):
    first = registry.publish("a", folder)
    second = registry.publish("a", folder)
    other = registry.publish("b", folder)
    assert (first.ref.generation, second.ref.generation) == (1, 2)
    assert first.ref.uid == second.ref.uid != other.ref.uid
    assert registry.resolve("a").ref == second.ref
    assert registry.resolve("a").generations == (1, 2)
    assert registry.names() == ("a", "b")
    assert [record.name for record in registry.records()] == ["a", "b"]
    assert second.info.rank == 4
    assert second.source == str(folder)


def test_a_taken_name_is_refused_unless_loaded_in_place(registry, folder):
    registry.publish("a", folder)
    with pytest.raises(
        AdapterError, match=r"'a' is loaded already, as generation 1. Set load_inplace"
    ):
        registry.publish("a", folder, load_inplace=False)
    assert registry.publish("b", folder, load_inplace=False).ref.generation == 1


def test_a_generation_does_not_change_when_its_folder_does(registry, base, folder):
    ref = registry.publish("a", folder).ref
    key = "model.layers.0.self_attn.q_proj"
    before = read_adapter(ref.path, base.model.spec).modules[key].b
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    assert torch.equal(read_adapter(ref.path, base.model.spec).modules[key].b, before)
    newer = registry.publish("a", folder).ref
    assert torch.equal(read_adapter(newer.path, base.model.spec).modules[key].b, before * 2)
    shutil.rmtree(folder)
    assert torch.equal(read_adapter(ref.path, base.model.spec).modules[key].b, before)


def test_a_prepared_generation_is_invisible_until_it_is_committed(registry, folder, freed):
    registry.publish("a", folder)
    prepared = registry.prepare("a", folder)
    assert registry.resolve("a").ref.generation == 1
    assert registry.acquire("a").generation == 1
    registry.commit(prepared, pinned=True)
    assert registry.acquire("a") == prepared.ref
    assert registry.resolve("a").pinned
    assert freed == []


def test_a_discarded_generation_leaves_nothing_and_its_number_is_not_reused(
    registry, folder, freed
):
    prepared = registry.prepare("a", folder)
    registry.discard(prepared)
    assert freed == [prepared.ref]
    assert not Path(prepared.ref.path).exists()
    assert registry.names() == ()
    registry.publish("b", folder)
    discarded = registry.prepare("b", folder)
    registry.discard(discarded)
    assert registry.publish("b", folder).ref.generation == 3


def test_a_broken_adapter_leaves_nothing_behind(registry, folder, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    copies = next(path for path in tmp_path.iterdir() if path.name.startswith("herd-adapters-"))
    with pytest.raises(AdapterError, match=r"^a \(.*\): this adapter cannot be served"):
        registry.publish("a", folder)
    assert [path.name for path in copies.iterdir()] == ["lock"]
    assert registry.names() == ()


def test_pickle_files_are_named_although_they_are_not_copied(registry, folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin: pickle files can run code"):
        registry.publish("a", folder)


def test_requests_keep_the_generation_that_they_began_with(registry, folder, freed):
    registry.publish("a", folder)
    held = [registry.acquire("a") for _ in range(2)]
    for _ in range(4):
        registry.publish("a", folder)
    assert registry.acquire("a").generation == 5
    assert registry.resolve("a").generations == (3, 4, 5)
    assert [ref.generation for ref in freed] == [2]  # 1 is in use
    assert Path(held[0].path).exists()
    registry.release(held[0])
    assert [ref.generation for ref in freed] == [2]
    registry.release(held[1])
    assert [ref.generation for ref in freed] == [2, 1]
    assert not Path(held[0].path).exists()


def test_requests_are_counted(registry, folder):
    registry.publish("a", folder)
    refs = [registry.acquire("a") for _ in range(3)]
    registry.publish("a", folder)
    refs.append(registry.acquire("a"))
    registry.release(refs[0])
    record = registry.resolve("a")
    assert (record.num_requests, record.num_running) == (4, 3)


def test_rollback_makes_an_older_generation_current_under_its_own_number(registry, folder):
    refs = [registry.publish("a", folder).ref for _ in range(3)]
    assert registry.rollback("a").ref == refs[1]
    assert registry.rollback("a").ref == refs[0]
    assert registry.acquire("a") == refs[0]
    assert registry.rollback("a", generation=3).ref == refs[2]
    registry.rollback("a", generation=1)
    assert registry.publish("a", folder).ref.generation == 4


def test_a_generation_that_was_rolled_back_to_is_kept(registry, folder, freed):
    for _ in range(3):
        registry.publish("a", folder)
    registry.rollback("a", 1)
    registry.publish("a", folder)  # 1 is neither current nor among the last three any more
    assert [ref.generation for ref in freed] == [1]
    assert registry.resolve("a").generations == (2, 3, 4)


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, "no earlier generation"), (7, "no generation 7")]
)
def test_rollback_to_what_is_not_kept_is_refused(registry, folder, generation, expected):
    registry.publish("a", folder)
    with pytest.raises(AdapterError, match=f"{expected} to go back to; it has 1, and 1 is current"):
        registry.rollback("a", generation)


def test_a_removed_name_is_gone_for_new_requests_and_lives_for_running_ones(
    registry, folder, freed
):
    registry.publish("a", folder)
    registry.publish("a", folder)
    ref = registry.acquire("a")
    registry.remove("a")
    assert [freed_ref.generation for freed_ref in freed] == [1]
    with pytest.raises(AdapterNotFound, match="No adapter 'a' is loaded; loaded are none"):
        registry.acquire("a")
    assert Path(ref.path).exists()
    again = registry.publish("a", folder).ref
    assert again.uid != ref.uid
    registry.release(ref)
    assert [freed_ref.generation for freed_ref in freed] == [1, 2]


def test_a_load_that_ends_after_its_name_was_given_away_is_refused(registry, folder):
    registry.publish("a", folder)
    prepared = registry.prepare("a", folder)
    registry.remove("a")
    registry.publish("a", folder)
    with pytest.raises(AdapterError, match="was removed and loaded anew"):
        registry.commit(prepared)


@pytest.mark.parametrize("method", ["acquire", "resolve", "remove", "rollback"])
def test_an_unknown_name_is_not_found(registry, folder, method):
    registry.publish("known", folder)
    with pytest.raises(AdapterNotFound, match="'x' is loaded; loaded are known"):
        getattr(registry, method)("x")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "-a", "a" * 129, "ä", "a\n"])
def test_names_that_would_not_fit_urls_are_refused(registry, folder, name):
    with pytest.raises(AdapterError, match="Adapter name"):
        registry.publish(name, folder)


def test_closing_removes_the_copies(base, folder, tmp_path):
    registry = Registry(base.model.spec, folder=tmp_path)
    path = Path(registry.publish("a", folder).ref.path)
    registry.close()
    assert not path.parent.exists()


def test_what_a_killed_server_left_behind_is_removed(base, folder, tmp_path):
    long_ago = time.time() - 3600
    left = tmp_path / "herd-adapters-left"
    left.mkdir()
    (left / "lock").touch()
    os.utime(left / "lock", (long_ago, long_ago))
    young = tmp_path / "herd-adapters-young"
    young.mkdir()
    (young / "lock").touch()
    running = Registry(base.model.spec, folder=tmp_path)
    kept = Path(running.publish("a", folder).ref.path)
    os.utime(kept.parent / "lock", (long_ago, long_ago))
    Registry(base.model.spec, folder=tmp_path).close()
    assert not left.exists()
    assert young.exists()
    assert kept.exists()  # its server holds it
    running.close()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_held_is_never_freed_and_the_rest_is_freed_once(registry, folder, freed, seed):
    choose = random.Random(seed)
    held, prepared, made = [], [], []
    calls = ["publish", "prepare", "commit", "discard", "rollback", "remove"] + ["acquire"] * 4
    for _ in range(120):
        name, call = choose.choice("ab"), choose.choice(calls)
        is_known = name in registry.names()
        if call == "publish":
            made.append(registry.publish(name, folder).ref)
        elif call == "prepare":
            prepared.append(registry.prepare(name, folder))
            made.append(prepared[-1].ref)
        elif call == "commit" and prepared:
            generation = prepared.pop()
            try:
                registry.commit(generation)
            except AdapterError:  # its name was loaded anew
                registry.discard(generation)
        elif call == "discard" and prepared:
            registry.discard(prepared.pop(0))
        elif call == "rollback" and is_known:
            registry.rollback(name, choose.choice(registry.resolve(name).generations))
        elif call == "remove" and is_known:
            registry.remove(name)
        elif call == "acquire" and is_known:
            held.append(registry.acquire(name))
        if held and choose.random() < 0.5:
            registry.release(held.pop(choose.randrange(len(held))))
        kept = {*held, *(one.ref for one in prepared), *(one.ref for one in registry.records())}
        assert not kept & set(freed)
        assert all(Path(ref.path).exists() for ref in kept)
    for name in registry.names():
        registry.remove(name)
    while held:
        registry.release(held.pop())
    while prepared:
        registry.discard(prepared.pop())
    assert sorted(made, key=str) == sorted(freed, key=str)
    assert not any(Path(ref.path).exists() for ref in made)
