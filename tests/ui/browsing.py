"""What a visitor does on the page, for the tests in Chromium."""

import re
import shutil
import time

from playwright.sync_api import expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def picker(page, title):
    return page.get_by_label(title, exact=True)


def pick(page, title, model):
    picker(page, title).click()
    page.get_by_role("option", name=re.compile(f"^{model}")).click()


def box(page):
    return page.locator(".herd-box textarea:visible")


def ask(page, text):
    box(page).fill(text)
    box(page).press("Enter")


def bylines(page):
    return page.locator(".herd-by:visible")


def wait_for_answer(page, number=1):
    """Until that many answers are complete, and the page takes the next message."""
    expect(bylines(page)).to_have_count(number)
    expect(page.get_by_role("button", name="Send").locator("visible=true")).to_be_visible()
    return bylines(page).nth(number - 1).inner_text()


def button(page, name):
    return page.locator(".herd-buttons:visible").get_by_role("button", name=name)


def wait_until(condition, what):
    """For what the stand-in sees: it runs in another thread."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
