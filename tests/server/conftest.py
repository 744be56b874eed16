from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import settings

from server.app import create_app
from server.state import ServerState
from tests.server.fake_engine import FakeEngine, build_state

settings.register_profile("herd", deadline=None)  # machines that run tests may be busy
settings.load_profile("herd")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def state(engine: FakeEngine) -> ServerState:
    return build_state(engine)


@pytest.fixture
async def client(state: ServerState) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the app in this process, as from this machine."""
    transport = httpx.ASGITransport(app=create_app(state), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client
