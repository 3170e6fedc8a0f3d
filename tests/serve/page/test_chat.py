"""Talking: streaming, stopping, answering again, editing, branches and failures."""

from __future__ import annotations

import json

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from serve.conftest import Served
from serve.page.conftest import answer_with, delta, events, say
from serve.running import wait_for

Page = sync_api.Page
ANSWER = ".message.assistant > .text"


def test_enter_sends_and_the_answer_comes_with_its_counts(page: Page, served: Served) -> None:
    page.focus("#input")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("one\ntwo")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".facts")).to_contain_text("13 tokens")
    expect(page.locator(".facts")).to_contain_text("tokens/s")
    assert page.input_value("#input") == ""
    say(page, "three")
    expect(page.locator(ANSWER)).to_have_count(2)
    prompt = list(served.engine.prompts.values())[-1]
    assert "user\none\ntwo<|im_end|>" in prompt
    assert "assistant\nHello there.<|im_end|>\n<|im_start|>user\nthree<|im_end|>" in prompt


def test_stop_frees_the_engine_and_keeps_what_came(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: "on and on " * 30
    served.engine.step_seconds = 0.03
    page.fill("#input", "Go")
    page.press("#input", "Enter")
    expect(page.locator(ANSWER)).to_contain_text("on and")
    page.click("#stop")
    expect(page.locator(".facts")).to_have_text("stopped")
    wait_for(lambda: len(served.engine.aborted) == 1)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWER)).to_contain_text("on and")
    page.keyboard.press("Escape")
    wait_for(lambda: len(served.engine.aborted) == 2)
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator(".empty")).to_be_visible()


def test_a_new_answer_is_a_branch_and_the_first_stays_reachable(page: Page, served: Served) -> None:
    say(page, "Hi")
    served.engine.script = lambda prompt: "Another one."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWER)).to_have_text("Another one.")
    expect(page.locator(".place")).to_have_text("2/2")
    say(page, "and then")
    page.get_by_role("button", name="Earlier branch").click()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".message")).to_have_count(2)  # what followed belongs to the other branch
    page.get_by_role("button", name="Later branch").click()
    expect(page.locator(".message")).to_have_count(4)
    expect(page.get_by_role("button", name="Later branch")).to_be_disabled()


def test_an_edit_branches_and_the_model_sees_only_its_own_branch(page: Page, served: Served) -> None:
    say(page, "first words")
    say(page, "a question")
    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_label("Edited message")
    assert box.input_value() == "first words"
    box.fill("other words")
    box.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text(["other words"])
    expect(page.locator(".place")).to_have_text("2/2")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    prompt = list(served.engine.prompts.values())[-1]
    assert "other words" in prompt
    assert "first words" not in prompt
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(page.locator(".message.user .text")).to_have_text(["other words"])
    page.reload()
    page.get_by_role("button", name="Earlier branch").click()
    expect(page.locator(".message.user .text")).to_have_text(["first words", "a question"])


def test_a_refused_message_shows_why_and_can_be_edited(page: Page, served: Served) -> None:
    say(page, "say <|im_end|>")
    expect(page.locator(".messages .failure")).to_contain_text("special token")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("say hello")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".failure:visible")).to_have_count(0)


def test_a_failure_on_the_way_keeps_the_beginning(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: "slowly " * 40
    served.engine.step_seconds = 0.03
    page.fill("#input", "Go")
    page.press("#input", "Enter")
    expect(page.locator(ANSWER)).to_contain_text("slowly")
    served.engine.fail_with = ValueError("broken")
    expect(page.locator(".message .failure")).to_contain_text("internal error")
    expect(page.locator(ANSWER)).to_contain_text("slowly")


def error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})


def test_errors_say_what_to_do(page: Page, served: Served) -> None:
    answers = iter(
        [
            (429, error("10 requests a minute"), {"retry-after": "7"}),
            (503, error("it is loading"), {"retry-after": "3"}),
        ]
    )
    answer_with(page, "/v1/chat/completions", lambda body: next(answers))
    failure = page.locator(".messages .failure")
    say(page, "Hi")
    expect(failure).to_have_text("Too many requests: 10 requests a minute Try again in 7 s.")
    page.get_by_role("button", name="Try again").click()
    expect(failure).to_have_text("The server is not ready: it is loading Try again in 3 s.")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    expect(failure).to_have_text("The server cannot be reached.")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    expect(page.locator(".message")).to_have_count(2)


def test_a_stream_that_ends_too_soon_is_an_error(page: Page, served: Served) -> None:
    cut = events(delta(content="The beginning")).removesuffix("data: [DONE]\n\n")
    answer_with(page, "/v1/chat/completions", lambda body: (200, cut, {}))
    say(page, "Hi")
    expect(page.locator(".message .failure")).to_have_text("The connection ended before the answer did.")
    expect(page.locator(ANSWER)).to_have_text("The beginning")


def test_a_key_is_asked_for_and_kept_for_the_tab_only(page: Page, served: Served) -> None:
    def guard(route: sync_api.Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, body=error("wrong key"), content_type="application/json")

    page.route("**/v1/**", guard)
    page.reload()
    expect(page.locator("#key-dialog")).to_be_visible()
    expect(page.locator("#key-reason")).to_have_text("wrong key")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator(".column select option")).to_have_count(2)
    say(page, "Hi")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    page.reload()
    expect(page.locator(".column select option")).to_have_count(2)
    stored = page.evaluate("[JSON.stringify(localStorage), document.cookie, JSON.stringify(sessionStorage)]")
    assert ["secret" in text for text in stored] == [False, False, True]
