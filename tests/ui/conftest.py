"""A served stand-in for the API, with the page in it."""

import socket
import threading
import time

import pytest
import uvicorn

from tests.ui.fake_api import FakeApi


class Served:
    """One FakeApi behind one port; the server in front of it can be restarted."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.api = FakeApi()
        self.start()

    def start(self) -> None:
        from ui.app import mount_page  # slow to import

        app = self.api.build()
        mount_page(app, self.url)
        config = uvicorn.Config(
            app, port=self.port, log_level="critical", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the stand-in server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def served_api():
    """One server for all tests of a module."""
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def api(served_api):
    """The stand-in, with a clean record."""
    served_api.api.reset()
    return served_api.api
