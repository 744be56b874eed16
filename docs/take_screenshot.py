"""Renew the picture of the page in the README.

Start Herd with the demo, then run `python docs/take_screenshot.py`. Needs Playwright and a Chromium
on the PATH. --help shows how to picture other sizes and views.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

QUESTIONS = ("What is NF4?", "Who are you?")
PICTURE = Path(__file__).parent / "images" / "page.png"
ANSWER_TIMEOUT_MS = 120_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=860)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--question", action="append", help="may be repeated")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("No chromium on the PATH. Install it (Debian: apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": args.width, "height": args.height},
            color_scheme="dark" if args.dark else "light",
        )
        page.goto(args.url)
        chat(page, args.question or QUESTIONS, side_by_side=args.side_by_side)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=args.out)
        browser.close()


def chat(page: Page, questions: list[str] | tuple[str, ...], *, side_by_side: bool) -> None:
    """Ask the questions; in the chat the last one goes to another adapter, to show the switch."""
    picker = page.get_by_label("Who answers", exact=True)
    expect(picker).not_to_have_value("")
    if side_by_side:
        page.get_by_role("tab", name="Side by side").click()
    num_answers = 0
    for i, question in enumerate(questions):
        if not side_by_side and 0 < i == len(questions) - 1:
            picker.click()
            first = re.escape(picker.input_value())
            others = page.get_by_role("option").filter(
                has_not_text=re.compile(rf"\(base\)|{first}")
            )
            (others if others.count() else page.get_by_role("option")).last.click()
        box = page.locator(".herd-box textarea:visible")
        box.fill(question)
        box.press("Enter")
        num_answers += 2 if side_by_side else 1
        expect(page.locator(".herd-by:visible")).to_have_count(num_answers)
        send = page.get_by_role("button", name="Send").locator("visible=true")
        send.wait_for(timeout=ANSWER_TIMEOUT_MS)
    page.mouse.move(0, 0)
    page.wait_for_timeout(800)  # scrolling settles


if __name__ == "__main__":
    main()
