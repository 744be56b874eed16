"""A served stand-in for the API, with the page in it."""

import re
import socket
import threading
import time
from urllib.parse import urlsplit

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
        from ui import train_view
        from ui.app import mount_page  # slow to import

        train_view.WATCH_INTERVAL_S = 0.5  # a run of the stand-in takes five looks
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


@pytest.fixture(scope="module")
def browser():
    # Not for the session: while Playwright runs, no asyncio test can.
    from playwright.sync_api import sync_playwright

    from tests.ui.browsing import ARGS, CHROMIUM

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    # One for all tests, so that the page's files come from its cache; the page keeps no cookies.
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def page(context, served_api):
    """The loaded page; afterwards: it called no other host and logged no error."""
    from playwright.sync_api import expect

    from tests.ui.browsing import picker

    url = served_api.url
    served_api.api.reset()
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda log: errors.append(log.text) if log.type == "error" else None)
    page.goto(url)
    expect(picker(page, "Who answers")).to_have_value(re.compile("guanaco"))
    yield page
    page.close()
    assert hosts - {""} == {urlsplit(url).netloc}  # "" is the host of data: addresses
    assert errors == []
