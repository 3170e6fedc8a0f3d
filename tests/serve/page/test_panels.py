"""Models side by side, the engine view, colours, the keyboard, and a phone."""

from __future__ import annotations

import json
import re

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from serve.conftest import Served
from serve.page.conftest import answer_with, fits, say

Page = sync_api.Page
ANSWER = ".message.assistant > .text"


def test_models_answer_side_by_side(page: Page, served: Served) -> None:
    say(page, "before")
    page.click("#compare")
    columns = page.locator(".column")
    expect(columns).to_have_count(2)
    expect(columns.nth(1).locator("select")).to_have_value("second")
    expect(columns.nth(1).locator(".message.user .text")).to_have_text("before")  # it knows what was said
    say(page, "both of you")
    expect(columns.nth(0).locator(ANSWER)).to_have_count(2)
    expect(columns.nth(1).locator(ANSWER)).to_have_count(2)
    assert len(served.engine.added) == 3
    # an edit holds for both; a new answer for one
    columns.nth(0).get_by_role("button", name="Edit").nth(1).click()
    page.get_by_label("Edited message").fill("edited")
    page.keyboard.press("Enter")
    for column in (columns.nth(0), columns.nth(1)):
        expect(column.locator(".message.user .text")).to_have_text(["before", "edited"])
        expect(column.locator(ANSWER)).to_have_count(2)
    expect(page.locator("#send")).to_be_visible()
    columns.nth(1).get_by_role("button", name="Regenerate").nth(1).click()
    expect(columns.nth(1).locator(".place")).to_have_count(2)
    expect(columns.nth(0).locator(".place")).to_have_count(1)
    page.reload()
    expect(columns).to_have_count(2)
    columns.nth(0).get_by_label("Remove this column").click()
    expect(columns).to_have_count(1)
    expect(columns.locator("select")).to_have_value("second")


def test_one_column_may_fail_and_the_other_answer(page: Page, served: Served) -> None:
    page.click("#compare")

    def second_fails(route: sync_api.Route) -> None:
        if route.request.post_data_json["model"] == "second":
            route.fulfill(status=404, json={"error": {"message": "gone"}})
        else:
            route.continue_()

    page.route("**/v1/chat/completions", second_fails)
    say(page, "Hi")
    expect(page.locator(".column").nth(0).locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".column").nth(1).locator(".failure")).to_have_text("gone")


def test_the_engine_view_follows_the_engine(page: Page, served: Served) -> None:
    state = {"running": 2, "waiting": 1, "blocks_used": 30, "blocks_free": 60, "blocks_cached": 10}
    state |= {"cache_hit_rate": 0.25, "generated_tokens": 0, "prompt_tokens": 500}

    def answer(body: object) -> tuple[int, str, dict[str, str]]:
        state["generated_tokens"] += 100
        return 200, json.dumps({"engines": [{"model": "scripted", **state}]}), {}

    bodies = answer_with(page, "/v1/engine", answer)
    page.click("#toggle-engine")
    card = page.locator("#engine .card")
    expect(card.locator("dt")).to_have_text(["Running", "Waiting", "Tokens/s", "Prompt tokens/s", "Cache hits"])
    expect(card.locator("dd").nth(0)).to_have_text("2")
    expect(card.locator("dd").nth(1)).to_have_text("1")
    expect(card.locator("dd").nth(4)).to_have_text("25.0%")
    expect(card).to_contain_text("Blocks: 30 used, 10 cached, 60 free")
    expect(card.locator("dd").nth(2)).not_to_have_text("0.0")
    expect(card.locator("polyline")).to_have_attribute("points", re.compile(r"\d+,\d+"))
    page.click("#toggle-engine")
    page.wait_for_timeout(100)
    seen = len(bodies)
    page.wait_for_timeout(1300)
    assert len(bodies) == seen  # a closed view asks nothing


def test_the_engine_view_says_when_it_cannot_see(page: Page, served: Served) -> None:
    page.route("**/v1/engine", lambda route: route.abort())
    page.click("#toggle-engine")
    expect(page.locator("#engine .failure")).to_have_text("The server cannot be reached.")


def test_colours_follow_the_system_until_one_chooses(page: Page, served: Served) -> None:
    def is_dark() -> bool:
        return bool(page.evaluate("getComputedStyle(document.body).backgroundColor === 'rgb(23, 21, 18)'"))

    page.emulate_media(color_scheme="dark")
    assert is_dark()
    page.emulate_media(color_scheme="light")
    assert not is_dark()
    page.click("#theme")
    expect(page.locator("#theme")).to_have_accessible_name("Colours: light")
    page.click("#theme")
    assert is_dark()
    page.reload()
    assert is_dark()
    page.click("#theme")
    assert not is_dark()


FOCUSED = "((e) => (e.ariaLabel || e.textContent || e.id).trim())(document.activeElement)"
UNNAMED = """[...document.querySelectorAll('button, select, textarea, input')]
    .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""


def test_everything_is_reached_by_the_keyboard(page: Page, served: Served) -> None:
    page.focus("body")
    seen = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        label = page.evaluate(FOCUSED)
        if label in seen:
            break
        seen.append(label)
    order = ["Conversations", "New chat", "Token probabilities", "Engine", "Settings", "Keyboard shortcuts", "Model"]
    assert [label for label in seen if label in order] == order
    unnamed = page.evaluate(UNNAMED)
    assert unnamed == []


def test_single_keys_open_what_they_name(page: Page, served: Served) -> None:
    page.focus("#help")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    expect(page.locator("#shortcut-list")).to_contain_text("New chat")
    page.keyboard.press("Escape")
    for key, panel in (("s", "#settings"), ("e", "#engine"), ("c", "#conversations")):
        page.focus("#help")
        page.keyboard.press(key)
        expect(page.locator(panel)).to_be_visible()
        assert page.evaluate(f"document.querySelector('{panel}').contains(document.activeElement)")
    page.focus("#help")
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("n?s")  # in a text field they are letters
    assert page.input_value("#input") == "n?s"
    page.click("#help")
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.focus("#help")
    page.keyboard.press("m")
    expect(page.locator(".column")).to_have_count(1)


def test_escape_closes_a_panel_and_the_focus_goes_back(page: Page, served: Served) -> None:
    page.click("#toggle-settings")
    page.focus("#set-top_p")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#toggle-settings")).to_be_focused()


@pytest.mark.parametrize("width", [360, 320])
def test_it_fits_a_phone(page: Page, served: Served, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    assert fits(page)
    served.engine.script = lambda prompt: (
        "word" * 40 + "\n\n```\n" + "x" * 90 + "\n```\n\n| a | b |\n|-|-|\n|" + "y" * 60 + "|z|"
    )
    say(page, "x" * 120)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".place")).to_have_text("2/2")
    assert fits(page)
    page.click("#compare")
    tabs = page.get_by_role("tab")
    expect(tabs).to_have_text(["scripted", "second"])
    expect(page.locator(".column:visible")).to_have_count(1)
    tabs.nth(1).focus()
    page.keyboard.press("ArrowLeft")
    expect(tabs.nth(0)).to_be_focused()
    expect(page.locator(".column:visible select")).to_have_value("scripted")
    for panel in ("settings", "engine", "conversations"):
        page.click(f"#toggle-{panel}")
        expect(page.locator(f"#{panel}")).to_be_visible()
        assert fits(page), panel
    page.click("#toggle-conversations")
    expect(page.locator("#send")).to_be_in_viewport()
    page.click("#toggle-tokens")
    served.engine.script = lambda prompt: "a few tokens " * 5
    page.locator(".column:visible").get_by_role("button", name="Regenerate").click()
    expect(page.locator("#send")).to_be_visible()
    page.locator(".column:visible .token").nth(3).focus()
    expect(page.locator(".alternatives")).to_be_visible()
    box = page.locator(".alternatives").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
