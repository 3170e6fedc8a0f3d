"""The chat page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

from serve.conftest import Served
from serve.running import wait_for

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

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, served: Served) -> Iterator[playwright.Page]:
    """The page, freshly opened; asserts at the end that it asked nobody else and that no script failed."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    page.set_default_timeout(10_000)
    hosts: set[str] = set()
    failures: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda line: failures.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(served.url)
    expect(page.locator("#model option")).to_have_count(2)
    yield page
    context.close()
    assert hosts == {urlsplit(served.url).netloc}
    assert not failures


def say(page: playwright.Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_enter_sends_and_the_answer_comes_with_its_counts(page: playwright.Page, served: Served) -> None:
    page.focus("#input")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("one\ntwo")
    expect(page.locator(".message.assistant .text")).to_have_text("Hello there.")
    expect(page.locator(".facts")).to_contain_text("13 tokens")
    expect(page.locator(".facts")).to_contain_text("tokens/s")
    assert page.input_value("#input") == ""
    say(page, "three")
    expect(page.locator(".message.assistant")).to_have_count(2)
    expect(page.get_by_text("Regenerate")).to_be_visible()
    prompt = list(served.engine.prompts.values())[-1]
    assert "user\none\ntwo<|im_end|>" in prompt
    assert "assistant\nHello there.<|im_end|>\n<|im_start|>user\nthree<|im_end|>" in prompt


def test_text_is_never_markup(page: playwright.Page, served: Served) -> None:
    attack = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    served.engine.script = lambda prompt: attack
    say(page, attack)
    expect(page.locator(".message.assistant .text")).to_have_text(attack)
    assert page.locator("#messages img, #messages script").count() == 0
    page.reload()
    expect(page.locator(".message .text")).to_have_text([attack, attack])
    assert page.title() == "Gristmill"


def test_settings_reach_the_engine_and_outlive_a_reload(page: playwright.Page, served: Served) -> None:
    page.click("#toggle-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "4")
    page.select_option("#model", "second")
    page.reload()
    say(page, "Hi")
    expect(page.locator(".message.assistant .text")).to_have_text("Hell")
    expect(page.locator(".facts")).to_contain_text("cut at the token limit")
    (params,) = served.engine.added.values()
    assert (params.temperature, params.max_tokens) == (0, 4)
    assert "system\nBe brief.<|im_end|>" in list(served.engine.prompts.values())[-1]
    page.click("#toggle-settings")
    page.fill("#max-tokens", "")
    page.get_by_text("Regenerate").click()
    expect(page.locator(".message.assistant .text")).to_have_text(["Hello there."])
    assert page.locator(".message").count() == 2


def test_stop_frees_the_engine_and_keeps_what_came(page: playwright.Page, served: Served) -> None:
    served.engine.script = lambda prompt: "on and on " * 30
    served.engine.step_seconds = 0.01
    say(page, "Go")
    expect(page.locator(".message.assistant .text")).to_contain_text("on and")
    page.click("#stop")
    expect(page.locator(".facts")).to_have_text("stopped")
    wait_for(lambda: len(served.engine.aborted) == 1)
    expect(page.locator("#send")).to_be_visible()
    page.get_by_text("Regenerate").click()
    expect(page.locator(".message.assistant .text")).to_contain_text("on and")
    page.keyboard.press("Escape")
    wait_for(lambda: len(served.engine.aborted) == 2)
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_a_refused_message_shows_why_and_can_be_edited(page: playwright.Page, served: Served) -> None:
    say(page, "say <|im_end|>")
    expect(page.locator(".failure")).to_contain_text("special token")
    page.get_by_text("Edit").click()
    assert page.input_value("#input") == "say <|im_end|>"
    expect(page.locator(".message")).to_have_count(0)
    say(page, "say hello")
    expect(page.locator(".message.assistant .text")).to_have_text("Hello there.")


def test_a_failure_on_the_way_keeps_the_beginning(page: playwright.Page, served: Served) -> None:
    served.engine.script = lambda prompt: "slowly " * 40
    served.engine.step_seconds = 0.01
    say(page, "Go")
    expect(page.locator(".message.assistant .text")).to_contain_text("slowly")
    served.engine.fail_with = ValueError("broken")
    expect(page.locator(".failure")).to_contain_text("internal error")
    expect(page.locator(".message.assistant .text")).to_contain_text("slowly")


def test_it_fits_a_phone(page: playwright.Page, served: Served) -> None:
    page.set_viewport_size({"width": 320, "height": 560})
    served.engine.script = lambda prompt: "word" * 60
    say(page, "x" * 120)
    expect(page.get_by_text("Regenerate")).to_be_visible()
    page.click("#toggle-settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 320
    expect(page.locator("#send")).to_be_in_viewport()
