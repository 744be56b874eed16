"""/v1/files with the unmodified openai client against the app in this process."""

import asyncio
import errno
import os
import sqlite3
import time
from pathlib import Path

import httpx
import openai
import pytest

import server.uploads
from engine.errors import EngineError
from server.app import create_app
from server.data_folder import DataFolder, open_data_folder
from tests.server.fake_engine import build_state
from tests.server.live import connect, read_answer, request_bytes, serving, wait_until

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture
def herd():
    """A server on a socket, its state, and OpenAI's client for it."""
    state = build_state(max_file_bytes=200_000, max_request_bytes=10_000)
    with serving(state) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client, state, port


def test_a_file_goes_up_and_comes_back(herd):
    client, state, _ = herd
    file = client.files.create(file=("data.jsonl", LINES), purpose="fine-tune")
    assert file.id.startswith("file-")
    assert (file.object, file.bytes, file.purpose) == ("file", len(LINES), "fine-tune")
    assert (file.filename, file.status, file.expires_at) == ("data.jsonl", "processed", None)
    assert abs(file.created_at - time.time()) < 60
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINES
    assert client.files.wait_for_processing(file.id).id == file.id
    assert state.files.path(file.id).read_bytes() == LINES
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    assert not state.files.path(file.id).exists()
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File"):
            call(file.id)


def test_the_list_pages_through_all_files(herd):
    client, _, _ = herd
    purposes = ["fine-tune", "batch"] * 4
    made = [client.files.create(file=(f"{i}", b"x"), purpose=p) for i, p in enumerate(purposes)]
    ids = [file.id for file in made]
    page = client.files.list(limit=3)
    assert [file.id for file in page.data] == ids[:-4:-1]
    assert page.has_more
    assert [file.id for file in page] == ids[::-1]  # follows the pages
    assert [file.id for file in client.files.list(limit=3, order="asc")] == ids
    assert [file.id for file in client.files.list(purpose="batch", limit=2)] == ids[7:0:-2]
    with pytest.raises(openai.BadRequestError, match="after"):
        client.files.list(after="file-nothing")
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(limit=0)


def test_a_file_expires(herd, monkeypatch):
    client, state, _ = herd
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=b"x", purpose="batch", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600
    later = time.time() + 3601
    monkeypatch.setattr("server.files.time.time", lambda: later)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert client.files.list().data == []
    asyncio.run(state.files.remove_expired())
    assert not state.files.path(file.id).exists()


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "fine-tune"}, "files": {"other": b"x"}}, "file"),
        ({"data": {"purpose": "fine-tune", "file": "x"}, "files": {"x": ("", b"")}}, "file"),
        ({"files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "fun"}, "files": {"file": b"x"}}, "purpose"),
        ({"data": {"purpose": "batch", "extra": "1"}, "files": {"file": b"x"}}, "extra"),
        (
            {
                "data": {
                    "purpose": "batch",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "9" * 30,
                },
                "files": {"file": b"x"},
            },
            "expires_after.seconds",
        ),
        (
            {
                "data": {"purpose": "batch", "expires_after[anchor]": "now"},
                "files": {"file": b"x"},
            },
            "expires_after.anchor",
        ),
    ],
)
async def test_bad_forms_are_refused_and_leave_nothing(client, state, form, param):
    response = await client.post("/v1/files", **form)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert list(state.files.path("x").parent.iterdir()) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=b", b"nonsense"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"'),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nhalf a file',
        ),
    ],
)
async def test_what_is_no_form_is_refused(client, state, content_type, body):
    headers = {"content-type": content_type}
    response = await client.post("/v1/files", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_form"
    assert list(state.files.path("x").parent.iterdir()) == []


def test_files_have_a_limit_of_their_own(herd):
    client, _, port = herd
    assert client.files.create(file=b"x" * 200_000, purpose="batch").bytes == 200_000
    with pytest.raises(openai.APIStatusError, match="max-file-bytes") as caught:
        client.files.create(file=b"x" * 300_000, purpose="batch")
    assert caught.value.status_code == 413
    with connect(port) as connection:  # other routes keep the small one
        connection.sendall(request_bytes("/v1/chat/completions", b"x" * 20_000))
        assert read_answer(connection)[0] == 413


def test_an_upload_that_breaks_off_leaves_nothing(herd):
    _, state, port = herd
    folder = state.files.path("x").parent
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 150000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    )
    with connect(port) as connection:
        connection.sendall(head + b"x" * 50_000)
        wait_until(lambda: list(folder.iterdir()))
    wait_until(lambda: not list(folder.iterdir()))


async def test_a_full_disk_is_told_and_leaves_nothing(client, state, monkeypatch):
    def write(_file, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server.uploads, "_write", write)
    form = {"data": {"purpose": "batch"}, "files": {"file": b"x"}}
    response = await client.post("/v1/files", **form)
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "storage_full"
    assert list(state.files.path("x").parent.iterdir()) == []
    monkeypatch.undo()
    assert (await client.post("/v1/files", **form)).status_code == 200


async def test_a_locked_database_is_told_and_leaves_nothing(client, state):
    form = {"data": {"purpose": "batch"}, "files": {"file": b"x"}}
    kept = (await client.post("/v1/files", **form)).json()
    other = sqlite3.connect(state.jobs.shop.database.engine.url.database)
    other.execute("BEGIN IMMEDIATE")
    response = await client.post("/v1/files", **form)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "database_unavailable"
    assert response.headers["Retry-After"]
    names = [path.name for path in state.files.path("x").parent.iterdir()]
    assert names == [kept["id"]]
    assert (await client.get(f"/v1/files/{kept['id']}")).json() == kept  # reading goes on
    other.rollback()
    assert (await client.post("/v1/files", **form)).status_code == 200


async def test_only_the_last_part_of_a_name_is_kept(client):
    files = {"file": ("../../etc/passwd.jsonl", b"x")}
    response = await client.post("/v1/files", data={"purpose": "batch"}, files=files)
    assert response.json()["filename"] == "passwd.jsonl"


async def test_changing_files_needs_the_admin_key():
    state = build_state(api_key=("user",), admin_api_key="root")
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        form = {"data": {"purpose": "batch"}, "files": {"file": b"x"}}
        user, root = ({"Authorization": f"Bearer {key}"} for key in ("user", "root"))
        assert (await client.post("/v1/files", **form)).status_code == 401
        assert (await client.post("/v1/files", **form, headers=user)).status_code == 401
        file = (await client.post("/v1/files", **form, headers=root)).json()
        path = f"/v1/files/{file['id']}"
        assert (await client.get(path)).status_code == 401
        assert (await client.get(path, headers=user)).status_code == 200
        assert (await client.delete(path, headers=user)).status_code == 401
        assert (await client.delete(path, headers=root)).status_code == 200


def test_what_a_crash_left_of_an_upload_is_removed_a_day_later(tmp_path):
    folder = DataFolder(tmp_path)
    old, new = folder.file("file-old.part"), folder.file("file-new.part")
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    folder.remove_unfinished()
    assert not old.exists()
    assert new.exists()


def test_a_data_folder_that_cannot_be_written(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EngineError, match=r"--data-dir .*cannot be written"):
        open_data_folder(str(blocked / "data"), tmp_path)
    folder = open_data_folder(None, blocked / "data")
    assert folder.path.is_dir()
    assert "Name a folder with --data-dir" in caplog.text
    folder.path.rmdir()
    assert open_data_folder(str(tmp_path / "new"), blocked).path == Path(tmp_path / "new")
