"""The page in a real browser, on a scripted server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

from serve.conftest import Served

sync_api.expect.set_options(timeout=20_000)  # milliseconds: a busy machine is no failure
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need a browser."""
    for item in items:
        if "serve/page/" in item.nodeid:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)"))


@pytest.fixture(scope="package")  # its event loop must be gone when other tests run theirs
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser, served: Served) -> Iterator[sync_api.Page]:
    """The page, freshly opened; asserts at the end that it asked nobody else and that no script failed."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 760}, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    hosts: set[str] = set()
    failures: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda line: failures.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(served.url)
    sync_api.expect(page.locator(".column select option")).to_have_count(2)
    yield page
    context.close()
    assert hosts - {""} == {urlsplit(served.url).netloc}  # a file made in the page has no host
    assert not failures


def say(page: sync_api.Page, text: str) -> None:
    """Send a message and wait until the answer, or its failure, is complete."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    sync_api.expect(page.locator("#send")).to_be_visible()


def events(*chunks: object) -> str:
    """The body of a stream."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def delta(**fields: object) -> dict[str, object]:
    """A chunk of a chat answer."""
    return {"choices": [{"index": 0, "delta": fields, "logprobs": None, "finish_reason": None}]}


Answer = Callable[[dict[str, object]], tuple[int, str, dict[str, str]]]


def answer_with(page: sync_api.Page, path: str, answer: Answer) -> list[dict[str, object]]:
    """Answer requests to `path` in the server's place with (status, body, headers); returns their bodies."""
    bodies: list[dict[str, object]] = []

    def handle(route: sync_api.Route) -> None:
        bodies.append(route.request.post_data_json or {})
        status, body, headers = answer(bodies[-1])
        kind = "text/event-stream" if body.startswith("data:") else "application/json"
        route.fulfill(status=status, body=body, headers={"content-type": kind, **headers})

    page.route(f"**{path}", handle)
    return bodies


def fits(page: sync_api.Page) -> bool:
    """Whether nothing can be scrolled sideways."""
    every = "[document.documentElement, ...document.querySelectorAll('.scroller, .side, footer')]"
    return bool(page.evaluate(f"{every}.every((e) => e.scrollWidth <= e.clientWidth)"))
