"""From names to folders: local, aliases, the hub; and no path leads out of the allowed folders."""

import os
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from adapters.confine import confine, copy_adapter, startup_roots
from adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry import Registry
from adapters.resolve import DEMO, parse_adapter, resolve_adapter, resolve_base
from engine.errors import AdapterError, CheckpointError


def adapter_folder(path):
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_text("{}")
    (path / WEIGHTS_FILE).write_bytes(b"weights")
    return path


def base_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that records what is asked for; has[repository] is what it answers."""

    class Hub:
        def __init__(self):
            self.asked = []
            self.has = {}

        def __call__(self, repository, allow_patterns, ignore_patterns):
            self.asked.append(repository)
            self.patterns = allow_patterns
            assert "*/*" in ignore_patterns
            answer = self.has.get(
                repository, LocalEntryNotFoundError("offline and not in the cache")
            )
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    return hub


# Names.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("guanaco", ("guanaco", "guanaco")),
        ("g=/data/a=b", ("g", "/data/a=b")),
        ("./adapters/mine", ("mine", "./adapters/mine")),
        ("/data/mine/", ("mine", "/data/mine/")),
        ("someone/guanaco-7b", ("guanaco-7b", "someone/guanaco-7b")),
        ("/data/x=1/mine", ("mine", "/data/x=1/mine")),
        ("ft:base:org:x:1=a", ("ft:base:org:x:1", "a")),
    ],
)
def test_adapter_flags_are_names_and_paths(text, expected):
    assert parse_adapter(text) == expected


@pytest.mark.parametrize("text", ["", "=x", "a=", "a b=x", "/", "..", "./a b"])
def test_adapter_flags_without_a_usable_name_are_refused(text):
    with pytest.raises(AdapterError):
        parse_adapter(text)


# Bases.


def test_the_demo_needs_no_folder(hub):
    assert resolve_base("demo", None) == DEMO / "model"
    assert hub.asked == []


def test_a_local_folder_comes_before_the_model_folder(hub, tmp_path):
    in_models = base_folder(tmp_path / "models" / "llama-7b")
    assert resolve_base("llama-7b", tmp_path / "models") == in_models
    base_folder(tmp_path / "llama-7b")
    assert resolve_base("llama-7b", tmp_path / "models").resolve() == tmp_path / "llama-7b"
    assert hub.asked == []


@pytest.mark.parametrize(
    ("alias", "repository"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("LLaMA-65B", "huggyllama/llama-65b"),
        ("llama-33b", "huggyllama/llama-30b"),
    ],
)
def test_aliases_lead_to_repositories(hub, tmp_path, alias, repository):
    hub.has[repository] = tmp_path
    assert resolve_base(alias, None) == tmp_path
    assert hub.asked == [repository]
    assert not any(
        pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in hub.patterns
    )


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("offline"),
        httpx.ConnectError("no route to host"),
        OSError("disk full"),
    ],
)
def test_a_base_that_is_nowhere_lists_what_was_tried(hub, tmp_path, failure):
    (tmp_path / "models" / "llama-7b").mkdir(parents=True)
    hub.has["huggyllama/llama-7b"] = failure
    with pytest.raises(CheckpointError) as caught:
        resolve_base("llama-7b", tmp_path / "models")
    message = str(caught.value)
    assert "- llama-7b: no such folder" in message
    assert "models/llama-7b: a folder without config.json" in message
    assert f"Hugging Face repository huggyllama/llama-7b: {failure}" in message


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "nothing", "../x", "a/b/c", "a\0b", "x" * 5000]
)
def test_what_cannot_be_a_repository_is_not_asked_for(hub, name):
    with pytest.raises(CheckpointError, match="is not a repository id"):
        resolve_base(name, None)
    assert hub.asked == []


# Adapters.


def test_adapters_are_found_locally_in_their_folders_or_in_the_demo(hub, tmp_path, monkeypatch):
    mine = adapter_folder(tmp_path / "adapters" / "mine")
    assert resolve_adapter("mine", "llama-7b", [tmp_path / "other", tmp_path / "adapters"]) == mine
    assert resolve_adapter(str(mine), "llama-7b", []) == mine
    monkeypatch.setattr("adapters.resolve.DEMO", tmp_path / "demo")
    demo = adapter_folder(tmp_path / "demo" / "adapters" / "guanaco")
    assert resolve_adapter("guanaco", "demo", []) == demo
    assert hub.asked == []


@pytest.mark.parametrize(
    ("base", "repository"),
    [
        ("llama-7b", "timdettmers/guanaco-7b"),
        ("huggyllama/llama-30b", "timdettmers/guanaco-33b"),
        ("/models/LLaMA-65B-nf4", "timdettmers/guanaco-65b"),
        ("llama13b", "timdettmers/guanaco-13b"),
    ],
)
def test_guanaco_follows_the_size_of_the_base(hub, tmp_path, base, repository):
    hub.has[repository] = adapter_folder(tmp_path / "download")
    assert resolve_adapter("guanaco", base, []) == tmp_path / "download"
    assert hub.asked == [repository]


@pytest.mark.parametrize(
    "base",
    ["mistral-7b", "llama-3.7b", "qwen-1.7b", "llama-70b", "Llama-2-7b-hf", "llama2_13b", "/m/x"],
)
def test_guanaco_is_refused_where_the_base_is_not_a_first_llama(hub, base):
    with pytest.raises(AdapterError, match="does not say that it is one of them"):
        resolve_adapter("guanaco", base, [])
    assert hub.asked == []


def test_a_repository_of_pickle_files_is_refused_with_the_remedy(hub, tmp_path):
    folder = adapter_folder(tmp_path / "download")
    (folder / WEIGHTS_FILE).unlink()
    hub.has["someone/old"] = folder
    with pytest.raises(
        AdapterError, match=r"someone/old has no adapter_model.safetensors. Older repositories"
    ):
        resolve_adapter("someone/old", "llama-7b", [])


# Confinement.


@pytest.fixture
def root(tmp_path):
    adapter_folder(tmp_path / "outside" / "secret")
    adapter_folder(tmp_path / "root" / "good")
    return tmp_path / "root"


def test_paths_inside_are_found_absolute_or_relative(root, tmp_path):
    adapter_folder(tmp_path / "second" / "other")
    roots = [root, tmp_path / "second"]
    assert confine("good", roots) == root / "good"
    assert confine(root / "good", roots) == root / "good"
    assert confine("other", roots) == tmp_path / "second" / "other"
    assert confine("nested/../good", roots) == root / "good"
    assert confine(root, roots) == root


def test_a_path_relative_to_the_working_folder_is_confined_too(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert confine("root/good", [root]) == root / "good"
    assert confine("./good", [Path("root")]) == root / "good"
    with pytest.raises(AdapterError, match="no such folder in"):  # it would be root/outside/secret
        confine("outside/secret", [root])


def test_paths_that_lead_out_are_refused_alike_whether_they_exist_or_not(root, tmp_path):
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "circle").symlink_to(root / "circle")
    messages = set()
    for path in (
        "../outside/secret",
        "../outside/nothing",
        "link/secret",
        "link/nothing",
        str(tmp_path / "outside" / "secret"),
        "/etc",
        "/etc/nothing",
        "good/../../outside/secret",
        "a\0b",
        str(root) + "-beside",
    ):
        with pytest.raises(AdapterError) as caught:
            confine(path, [root])
        messages.add(str(caught.value).replace(path, "PATH"))
    assert messages == {f"PATH: not in a folder from which adapters may be loaded: {root}."}


def test_a_missing_folder_inside_is_told(root):
    with pytest.raises(AdapterError, match="bad: no such folder in"):
        confine("bad", [root])
    with pytest.raises(AdapterError, match="xxx: no such folder in"):
        confine("x" * 5000, [root])
    with pytest.raises(AdapterError):
        confine(f"good/{CONFIG_FILE}", [root])


def test_without_roots_nothing_is_loaded(root):
    with pytest.raises(AdapterError, match="started without --adapter-dir"):
        confine(root / "good", [])


def test_files_that_are_links_out_of_the_roots_are_not_copied(root, tmp_path, base):
    (root / "good" / WEIGHTS_FILE).unlink()
    (root / "good" / WEIGHTS_FILE).symlink_to(tmp_path / "outside" / "secret" / WEIGHTS_FILE)
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(AdapterError, match="a link that leads out"):
        copy_adapter(root / "good", copy, [root])
    registry = Registry(base.model.spec, folder=tmp_path)
    with pytest.raises(AdapterError, match="a link that leads out"):
        registry.prepare("a", root / "good", roots=[root])
    registry.close()


def test_links_inside_the_roots_are_followed(root, tmp_path):
    blob = root / "blobs" / "abc"
    blob.parent.mkdir()
    (root / "good" / WEIGHTS_FILE).rename(blob)
    (root / "good" / WEIGHTS_FILE).symlink_to(blob)
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_adapter(root / "good", copy, [root])
    assert (copy / WEIGHTS_FILE).read_bytes() == b"weights"
    assert not (copy / WEIGHTS_FILE).is_symlink()


def test_a_start_up_path_opens_itself_and_where_its_links_lead(tmp_path):
    # As in the hub's cache: snapshots/<revision>/<file> -> ../../blobs/<hash>.
    folder = adapter_folder(tmp_path / "repository" / "snapshots" / "1")
    blobs = tmp_path / "repository" / "blobs"
    blobs.mkdir()
    (folder / WEIGHTS_FILE).rename(blobs / "abc")
    (folder / WEIGHTS_FILE).symlink_to(blobs / "abc")
    roots = startup_roots(folder)
    assert roots == (folder, blobs / "abc")
    assert startup_roots(adapter_folder(tmp_path / "plain")) == (tmp_path / "plain",)
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_adapter(confine(folder, roots), copy, roots)
    assert (copy / WEIGHTS_FILE).read_bytes() == b"weights"


def test_a_named_pipe_is_refused_and_does_not_block(root, tmp_path):
    (root / "good" / WEIGHTS_FILE).unlink()
    os.mkfifo(root / "good" / WEIGHTS_FILE)
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(AdapterError, match="not a plain file"):
        copy_adapter(root / "good", copy, [root])


def test_an_unreadable_file_is_an_adapter_error(root, tmp_path):
    (root / "good" / WEIGHTS_FILE).unlink()
    (root / "good" / WEIGHTS_FILE).mkdir()
    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(AdapterError):
        copy_adapter(root / "good", copy, [root])
