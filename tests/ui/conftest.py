"""A served stand-in for the API, with the page in it."""

import socket
import threading
import time

import pytest
import uvicorn

from tests.ui.fake_api import FakeApi


@pytest.fixture(scope="module")
def served_api():
    """(FakeApi, base URL); one server for all tests of a module."""
    from ui.app import mount_page  # slow to import

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    api, url = FakeApi(), f"http://127.0.0.1:{port}"
    app = api.build()
    mount_page(app, url)
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the stand-in server did not start"
        time.sleep(0.02)
    yield api, url
    server.should_exit = True
    thread.join()


@pytest.fixture
def api(served_api):
    """The stand-in, with a clean record."""
    served_api[0].reset()
    return served_api[0]
