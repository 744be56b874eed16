"""Keys, the admin's routes, foreign pages."""

import importlib
import inspect
import re
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.auth import is_loopback, require_admin, require_key
from tests.server.fake_engine import add_adapter, build_state

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/score"),
    ("GET", "/v1/models"), ("GET", "/v1/models/base"), ("DELETE", "/v1/models/ada"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/ada"), ("POST", "/v1/adapters/ada/rollback"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("GET", "/version"), ("GET", "/metrics"), ("GET", "/v1/unknown"),
    ("POST", "/score"), ("POST", "/pooling"), ("POST", "/v1/rewards"),
    ("POST", "/v1/feedback"), ("GET", "/v1/feedback"), ("GET", "/v1/feedback/summary"),
    ("POST", "/v1/feedback/export"), ("GET", "/v1/feedback/{feedback_id}"),
    ("DELETE", "/v1/feedback/{feedback_id}"),
    ("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"), ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"), ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
]  # fmt: skip
ADMIN = [
    ("DELETE", "/v1/models/ada"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("POST", "/v1/adapters/ada/rollback"),
    ("GET", "/v1/feedback"), ("GET", "/v1/feedback/summary"), ("POST", "/v1/feedback/export"),
    ("GET", "/v1/feedback/{feedback_id}"), ("DELETE", "/v1/feedback/{feedback_id}"),
    ("POST", "/v1/files"), ("DELETE", "/v1/files/{file_id}"), ("POST", "/v1/fine_tuning/jobs"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
]  # fmt: skip


def connect(address=("127.0.0.1", 5000), base_url="http://localhost:8000", **config):
    state = build_state(**config)
    add_adapter(state, "ada")
    transport = httpx.ASGITransport(create_app(state), client=address, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=base_url)


def bearer(key) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_asks_for_a_key(method, path):
    async with connect(api_key=("one", "two"), admin_api_key="boss") as client:
        for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": "one"}, bearer("on")):
            response = await client.request(method, path, headers=headers, content=b"{broken")
            assert response.status_code == 401, headers  # before the body is looked at
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


async def test_the_table_above_has_every_route():
    known = {(method, re.sub("/ada(?=/|$)", "/{name}", path)) for method, path in ROUTES}
    known |= {("GET", "/v1/models/{model:path}"), ("DELETE", "/v1/models/{model:path}")}
    for file in (Path(__file__).parents[2] / "server" / "routes").glob("*.py"):
        for route in importlib.import_module(f"server.routes.{file.stem}").router.routes:
            if route.path not in ("/health", "/v1/{path:path}"):
                assert {(method, route.path) for method in route.methods} <= known, route.path


def test_keys_are_checked_on_the_event_loop():
    # FastAPI runs dependencies that are no coroutines in a thread: a detour for every request.
    assert all(map(inspect.iscoroutinefunction, (require_key, require_admin)))


async def test_health_needs_no_key():
    async with connect(api_key=("one",)) as client:
        assert (await client.get("/health")).status_code == 200


async def test_each_key_opens_and_so_does_the_admins():
    async with connect(api_key=("one", "two"), admin_api_key="boss") as client:
        for key in ("one", "two", "boss"):
            response = await client.post("/v1/chat/completions", json=CHAT, headers=bearer(key))
            assert response.status_code == 200
        lower = {"Authorization": "bearer one"}
        assert (await client.get("/v1/models", headers=lower)).status_code == 200


async def test_keys_beyond_ascii_are_compared_without_a_crash():
    async with connect(api_key=("schlüssel",)) as client:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert (await client.get("/v1/models", headers=headers)).status_code == status


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_routes_that_change_the_server_ask_for_the_admins_key(method, path):
    async with connect(api_key=("one",), admin_api_key="boss") as client:
        refused = await client.request(method, path, headers=bearer("one"))
        assert refused.status_code == 401
        opened = await client.request(method, path, headers=bearer("boss"))
        assert opened.status_code in (200, 400, 404, 409)  # no body, or nothing of that name


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_an_admin_key_alone_guards_only_these(method, path):
    async with connect(admin_api_key="boss") as client:
        assert (await client.request(method, path)).status_code == 401
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_without_an_admin_key_any_key_will_do(method, path):
    async with connect(api_key=("one",), address=("8.8.8.8", 1)) as client:
        opened = await client.request(method, path, headers=bearer("one"))
        assert opened.status_code in (200, 400, 404, 409)


@pytest.mark.parametrize(("method", "path"), ADMIN)
async def test_without_keys_only_this_machine_may_change_the_server(method, path):
    for address, allowed in (("127.0.0.1", True), ("::1", True), ("192.168.0.7", False)):
        async with connect(address=(address, 1), host="0.0.0.0") as client:
            response = await client.request(method, path)
            assert (response.status_code != 403) is allowed
            assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("forwarded", "allowed"),
    [("127.0.0.1", True), ("8.8.8.8", False), ("127.0.0.1, 8.8.8.8", False), ("::1", True)],
)
async def test_what_is_handed_on_for_another_machine_is_not_of_this_one(forwarded, allowed):
    async with connect() as client:
        headers = {"X-Forwarded-For": forwarded}
        response = await client.post("/v1/unload_lora_adapter", headers=headers)
        assert (response.status_code != 403) is allowed


# --- pages of foreign origin ---


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil",
        ":::",
        "[::1",
        "[x]:80",
        "localhost:80:80",
        "localhost/x",
        "é",
    ],
)
async def test_a_rebound_host_name_is_refused(host):
    async with connect() as client:
        response = await client.get("/v1/models", headers={"Host": host.encode()})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "herd.localhost:8000"]
)
async def test_names_of_this_machine_are_allowed(host):
    async with connect() as client:
        assert (await client.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_a_proxys_host_name_can_be_allowed():
    async with connect(allowed_hosts=("herd.example",)) as client:
        headers = {"Host": "Herd.example:443"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_host_names_do_not_matter_on_other_interfaces_or_with_a_key():
    headers = {"Host": "herd.example"}
    async with connect(host="0.0.0.0") as client:
        assert (await client.get("/health", headers=headers)).status_code == 200
    async with connect(api_key=("one",)) as client:
        assert (await client.get("/health", headers=headers)).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:9999"])
async def test_a_page_of_another_origin_cannot_use_the_server(origin):
    async with connect() as client:
        # A form or fetch without preflight: text/plain, to a route that changes the server.
        response = await client.post(
            "/v1/unload_lora_adapter",
            content=b'{"lora_name": "ada"}',
            headers={"Origin": origin, "Content-Type": "text/plain"},
        )
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
        assert (await client.get("/v1/models/ada")).status_code == 200


async def test_the_servers_own_pages_may():
    async with connect() as client:
        headers = {"Origin": "http://localhost:8000"}
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).is_success


async def test_cors_is_off_by_default_and_on_for_named_origins():
    preflight = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    async with connect(api_key=("one",)) as client:
        response = await client.options("/v1/chat/completions", headers=preflight)
        assert "access-control-allow-origin" not in response.headers
    async with connect(api_key=("one",), allowed_origins=("https://chat.example",)) as client:
        response = await client.options("/v1/chat/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        headers = {**bearer("one"), "Origin": "https://chat.example"}
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        other = {**preflight, "Origin": "https://evil.example"}
        refused = await client.options("/v1/chat/completions", headers=other)
        assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("0.0.0.0", False), ("example.com", False),
        ("localhost.example.com", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host, expected):
    assert is_loopback(host) is expected
