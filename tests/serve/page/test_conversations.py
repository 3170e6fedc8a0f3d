"""Saved conversations: list, rename, delete, export, import, and what outlives a reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from serve.conftest import Served
from serve.page.conftest import answer_with, delta, events, say
from serve.running import wait_for

Page = sync_api.Page
ANSWER = ".message.assistant > .text"


def test_conversations_are_kept_renamed_and_deleted(page: Page, served: Served) -> None:
    say(page, "The first question")
    page.click("#new")
    say(page, "The second question")
    page.reload()
    expect(page.locator(".message.user .text")).to_have_text("The second question")
    page.click("#toggle-conversations")
    titles = page.locator("#conversation-list .conversation")
    expect(titles).to_have_text(["The second question", "The first question"])
    expect(titles.first).to_have_attribute("aria-current", "true")
    titles.nth(1).click()
    expect(page.locator(".message.user .text")).to_have_text("The first question")
    page.get_by_role("button", name="Rename The first question").click()
    page.get_by_label("Title", exact=True).fill("On mills")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("On mills")
    page.get_by_role("button", name="Delete On mills").click()
    page.get_by_role("button", name="Really delete On mills").click()
    expect(titles).to_have_text(["The second question"])
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(titles).to_have_count(1)


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: "on and on " * 30
    served.engine.step_seconds = 0.03
    page.click("#toggle-conversations")
    page.fill("#input", "Go")
    page.press("#input", "Enter")
    expect(page.locator(ANSWER)).to_contain_text("on and")
    page.get_by_role("button", name="Delete Go").click()
    page.get_by_role("button", name="Really delete Go").click()
    wait_for(lambda: len(served.engine.aborted) == 1)
    expect(page.locator("#conversation-list")).to_have_text("Nothing saved yet.")
    page.reload()
    page.click("#toggle-conversations")
    expect(page.locator("#conversation-list")).to_have_text("Nothing saved yet.")


def test_settings_reach_the_engine_and_outlive_a_reload(page: Page, served: Served) -> None:
    page.click("#toggle-settings")
    values = {
        "temperature": "0",
        "top_p": "0.5",
        "top_k": "3",
        "min_p": "0.1",
        "max_completion_tokens": "4",
        "seed": "7",
    }
    penalties = {"presence_penalty": "0.5", "frequency_penalty": "-0.5", "repetition_penalty": "1.1"}
    for name, value in {**values, **penalties, "system": "Be brief.", "stop": "zzz\nyyy"}.items():
        page.fill(f"#set-{name}", value)
    page.select_option(".column select", "second")
    say(page, "Hi")
    page.reload()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".place")).to_have_text("2/2")
    expect(page.locator(ANSWER)).to_have_text("Hell")
    expect(page.locator(".facts")).to_contain_text("cut at the token limit")
    params = list(served.engine.added.values())[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 3, 0.1)
    assert (params.max_tokens, params.seed, params.stop_strings) == (4, 7, ("zzz", "yyy"))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert "system\nBe brief.<|im_end|>" in list(served.engine.prompts.values())[-1]


def test_only_what_is_set_is_sent(page: Page, served: Served) -> None:
    bodies = answer_with(page, "/v1/chat/completions", lambda body: (200, events(delta(content="ok")), {}))
    say(page, "Hi")
    page.click("#toggle-settings")
    page.fill("#set-top_k", "5")
    page.fill("#set-stop", "END")
    say(page, "Hi")
    page.get_by_text("Use the server's defaults").click()
    say(page, "Hi")
    given = [set(body) - {"model", "messages", "stream", "stream_options"} for body in bodies]
    assert given == [set(), {"top_k", "stop"}, set()]
    assert (bodies[1]["top_k"], bodies[1]["stop"]) == (5, ["END"])


@pytest.mark.parametrize(("field", "value"), [("temperature", "3"), ("stop", "a\nb\nc\nd\ne"), ("tools", "{}")])
def test_a_wrong_setting_is_named_and_nothing_is_sent(page: Page, served: Served, field: str, value: str) -> None:
    page.click("#toggle-settings")
    page.fill(f"#set-{field}", value)
    expect(page.locator(f"#problem-{field}")).not_to_be_empty()
    page.click("#toggle-settings")
    say(page, "Hi")
    expect(page.locator(f"#set-{field}")).to_be_focused()
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator(".message")).to_have_count(0)
    assert page.input_value("#input") == "Hi"


def exported(page: Page, button: str, path: Path) -> str:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    return path.read_text()


def test_an_exported_conversation_comes_back_whole(page: Page, served: Served, tmp_path: Path) -> None:
    say(page, "A question")
    served.engine.script = lambda prompt: "Another answer."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".place")).to_have_text("2/2")
    page.click("#toggle-conversations")
    markdown = exported(page, "#export-markdown", tmp_path / "out.md")
    assert markdown == "# A question\n\n**You:**\n\nA question\n\n**scripted:**\n\nAnother answer.\n"
    exported(page, "#export-json", tmp_path / "out.json")
    page.get_by_role("button", name="Delete A question").click()
    page.get_by_role("button", name="Really delete A question").click()
    expect(page.locator(".message")).to_have_count(0)
    page.set_input_files("#import-file", tmp_path / "out.json")
    expect(page.locator(ANSWER)).to_have_text("Another answer.")
    page.get_by_role("button", name="Earlier branch").click()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
    page.reload()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")


def conversation(**changes: object) -> dict[str, object]:
    node = {"role": "user", "content": "Hi", "parent": -1, "next": -1}
    thread = {"model": "scripted", "first": 0, "nodes": [node]}
    base = {"format": "gristmill.conversation.1", "id": "x", "title": "", "system": "", "sampling": {}, "updated": 1}
    return {**base, "threads": [thread], **changes}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        json.dumps(conversation(format="another")),
        json.dumps(conversation(threads=[])),
        json.dumps(conversation(threads=[{"model": "m", "first": 3, "nodes": []}])),
        json.dumps(
            conversation(
                threads=[
                    {"model": "m", "first": 0, "nodes": [{"role": "user", "content": "x", "parent": -1, "next": 0}]}
                ]
            )
        ),  # a circle
        json.dumps(conversation(system=["x"])),
        json.dumps(conversation(sampling=None)),
        "null",
    ],
)
def test_another_file_is_refused_by_name(page: Page, served: Served, text: str) -> None:
    page.set_input_files("#import-file", {"name": "odd.json", "mimeType": "application/json", "buffer": text.encode()})
    expect(page.locator("#notice")).to_contain_text("odd.json is not")
    expect(page.locator(".message")).to_have_count(0)
    say(page, "still here")
    expect(page.locator(ANSWER)).to_have_text("Hello there.")


def test_a_good_file_of_that_form_is_taken(page: Page, served: Served) -> None:
    text = json.dumps(conversation(title="From afar"))
    page.set_input_files("#import-file", {"name": "a.json", "mimeType": "application/json", "buffer": text.encode()})
    expect(page.locator("#title")).to_have_text("From afar")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(ANSWER)).to_have_text("Hello there.")
