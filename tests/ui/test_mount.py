"""The page must neither shadow the API nor open a way around its keys."""

import httpx
import pytest

from ui.app import build_page, mount_page


@pytest.fixture
def http(served_api):
    served_api.api.reset()
    with httpx.Client(base_url=served_api.url, trust_env=False) as http:
        yield http


def test_unknown_paths_stay_the_apis(http):
    for path in ("/v1/nothing", "/nothing", "/gradio_api/nothing"):
        reply = http.get(path)
        assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/v1/models").json()["object"] == "list"
    described = http.get("/openapi.json").json()["paths"]
    assert all(path == "/health" or path.startswith("/v1/") for path in described)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/hostname"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:9/"),
        ("GET", "/gradio_api/deep_link"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/call/ask"),
        ("POST", "/gradio_api/run/ask"),
        ("GET", "/gradio_api/info"),
        ("POST", "/login"),
        ("GET", "/monitoring"),
    ],
)
def test_what_gradio_brings_and_the_page_does_not_use_is_closed(http, method, path):
    assert http.request(method, path).status_code == 404


def test_the_page_may_call_no_other_host(http):
    reply = http.get("/")
    assert reply.status_code == 200
    policy = reply.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    assert "content-security-policy" not in http.get("/v1/models").headers


@pytest.mark.parametrize(
    "data",
    [
        [{"path": "http://127.0.0.2:9/x", "meta": {"_type": "gradio.FileData"}}],
        {"a": [{"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}]},
    ],
)
def test_data_that_names_a_file_is_refused(http, data):
    body = {"data": data, "fn_index": 0, "session_hash": "s"}
    reply = http.post("/gradio_api/queue/join", json=body)
    assert (reply.status_code, reply.text) == (400, "Refused: this page takes no gradio.FileData")


def test_a_body_that_is_not_json_or_too_deep_is_refused(http):
    for body in (b"{", b"[" * 100_000, b"\xff"):
        assert http.post("/gradio_api/queue/join", content=body).status_code == 400


def test_the_keys_field_is_an_input_of_no_event_that_reaches_the_server():
    page = build_page("http://127.0.0.1:9")
    (key,) = [block for block in page.blocks.values() if getattr(block, "label", "") == "API key"]
    assert key.type == "password"
    assert all(key not in event.inputs for event in page.fns.values() if event.fn is not None)


def test_the_page_is_mounted_at_the_root_only():
    with pytest.raises(ValueError, match="path: expected '/', got '/ui'"):
        mount_page(None, "http://127.0.0.1:9", path="/ui")
