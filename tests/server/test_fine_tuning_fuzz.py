"""Whatever comes as a job or as an upload, it is taken or refused; never a 5xx."""

import asyncio
import json
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.app import create_app
from server.hyperparameters import METHODS, allowed_names
from tests.server.fake_engine import build_state

TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
NAMES = sorted({name for method in METHODS for name in allowed_names(method)})
VALUE = (
    st.sampled_from(["auto", 1, 0, -1, 0.5, 1e308, 2**70, True, ["q_proj"], [], "linear"]) | JSON
)
HYPERPARAMETERS = st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUE, max_size=3) | JSON
GRADER = st.fixed_dictionaries(
    {"type": st.sampled_from(["score_model", "python"]) | TEXT},
    optional={"name": TEXT, "model": TEXT, "input": JSON},
)
METHOD = st.sampled_from(list(METHODS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {"type": st.just(name)},
        optional={
            name: st.fixed_dictionaries(
                {}, optional={"hyperparameters": HYPERPARAMETERS, "grader": GRADER}
            ),
            "other": JSON,
        },
    )
)


def body_of(file_id):
    return st.fixed_dictionaries(
        {"model": st.just("base") | TEXT, "training_file": st.just(file_id) | TEXT},
        optional={
            "validation_file": st.just(file_id) | TEXT,
            "method": METHOD | JSON,
            "hyperparameters": HYPERPARAMETERS,
            "suffix": TEXT,
            "seed": st.integers(-1, 2**33),
            "metadata": st.dictionaries(TEXT, TEXT, max_size=2) | JSON,
            "integrations": st.lists(JSON, max_size=2),
        },
    )


@pytest.fixture(scope="module")
def app():
    """The app, and the id of a file; jobs wait for a runner that never comes."""
    state = build_state()
    state.jobs.runner.is_in_charge = True
    app = create_app(state)

    async def upload():
        async with client_of(app) as client:
            form = {"data": {"purpose": "fine-tune"}, "files": {"file": b"{}"}}
            return (await client.post("/v1/files", **form)).json()["id"]

    return app, asyncio.run(upload())


def client_of(app):
    transport = httpx.ASGITransport(app=app)  # exceptions of the app are raised here
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def test_no_job_makes_a_5xx(app):
    app, file_id = app

    @settings(max_examples=200, deadline=None)
    @given(body=body_of(file_id))
    def check(body):
        async def post():
            async with client_of(app) as client:
                content = json.dumps(body).encode()
                response = await client.post("/v1/fine_tuning/jobs", content=content)
                if response.status_code == 200:
                    job_id = response.json()["id"]
                    found = await client.get(f"/v1/fine_tuning/jobs/{job_id}")
                    assert found.json() == response.json()
                return response

        response = asyncio.run(post())
        assert response.status_code in (200, 400, 404), (response.text, body)
        if response.status_code != 200:
            assert response.json()["error"]["message"]

    check()


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            [b"--b\r\n", b"--b--\r\n", b"\r\n", b"\r\n\r\n", b"x", b"--b", b'filename="f"', b"--"]
        )
        | st.sampled_from(['name="file"', 'name="purpose"', 'filename="f"', 'name=""']).map(
            lambda rest: f"Content-Disposition: form-data; {rest}\r\n".encode()
        )
        | st.binary(max_size=4),
        max_size=10,
    )
)
def test_no_upload_makes_a_5xx(app, parts):
    async def post():
        async with client_of(app[0]) as client:
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            return await client.post("/v1/files", content=b"".join(parts), headers=headers)

    response = asyncio.run(post())
    assert response.status_code in (200, 400), response.text


@settings(max_examples=100, deadline=None)
@given(
    path=st.sampled_from(["/v1/files", "/v1/fine_tuning/jobs"]),
    rest=st.text(max_size=10),
    query=st.dictionaries(
        st.sampled_from(["after", "limit", "order", "purpose", "metadata[a]"]) | TEXT,
        TEXT,
        max_size=3,
    ),
)
def test_no_look_at_a_list_makes_a_5xx(app, path, rest, query):
    async def get():
        async with client_of(app[0]) as client:
            listed = await client.get(path, params=query)
            return listed, await client.get(f"{path}/{quote(rest, safe='')}", params=query)

    for response in asyncio.run(get()):
        assert response.status_code in (200, 307, 400, 404), response.text
