"""The view of token probabilities, and branches that begin at a token."""

from __future__ import annotations

import json

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from serve.conftest import Served
from serve.page.conftest import answer_with, events, say

Page = sync_api.Page
Asked = dict[str, list[dict[str, object]]]
ANSWER = ".message.assistant > .text"


def top(*tokens: tuple[str, int, float]) -> list[dict[str, object]]:
    return [{"token": text, "token_id": i, "logprob": p, "bytes": list(text.encode())} for text, i, p in tokens]


def chat_stream() -> str:
    """ "The cat sat", each token with one alternative."""
    places = [
        [(("The"), 10, -0.1), ("A", 11, -2.4)],
        [(" dog", 21, -0.4), (" cat", 20, -1.2)],  # the second best was taken
        [(" sat", 30, -0.2), (" ran", 31, -1.9)],
    ]
    chosen = [0, 1, 0]
    chunks = []
    for place, taken in zip(places, chosen, strict=True):
        entry = {**top(*place)[taken], "top_logprobs": top(*place)}
        choice = {
            "index": 0,
            "delta": {"content": place[taken][0]},
            "logprobs": {"content": [entry]},
            "finish_reason": None,
        }
        chunks.append({"choices": [choice]})
    return events(*chunks)


def completion_stream() -> str:
    logprobs = {
        "tokens": [" ran", " off"],
        "token_logprobs": [-0.3, -0.7],
        "top_logprobs": [{" ran": -0.3, " sat": -1.4}, {" off": -0.7, " on": -1.1}],
        "text_offset": [0, 4],
        "token_ids": [31, 40],
    }
    choice = {"index": 0, "text": " ran off", "logprobs": logprobs, "finish_reason": "stop"}
    return events({"choices": [choice]}, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})


def tokenized(body: dict[str, object]) -> tuple[int, str, dict[str, str]]:
    ids = [1, 2, 3, 4, 5] if "messages" in body else [41]
    return 200, json.dumps({"tokens": ids, "count": len(ids), "max_model_len": 100}), {}


@pytest.fixture
def asked(page: Page) -> Asked:
    """What was asked of each route, with the view on and the answer there."""
    asked = {
        "chat": answer_with(page, "/v1/chat/completions", lambda body: (200, chat_stream(), {})),
        "tokenize": answer_with(page, "/tokenize", tokenized),
        "completions": answer_with(page, "/v1/completions", lambda body: (200, completion_stream(), {})),
    }
    page.click("#toggle-tokens")
    say(page, "Hi")
    expect(page.locator(".token")).to_have_text(["The", " cat", " sat"])
    return asked


def test_pointing_at_a_token_shows_what_else_could_stand_there(page: Page, asked: Asked) -> None:
    assert (asked["chat"][0]["logprobs"], asked["chat"][0]["top_logprobs"]) == (True, 5)
    page.locator(".token").nth(1).hover()
    rows = page.locator(".alternative")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("␣dog67.0%-0.400")
    expect(rows.nth(1)).to_contain_text("␣cat30.1%-1.200")
    expect(rows.nth(1)).to_be_disabled()  # it stands there already
    page.mouse.move(5, 300)
    expect(rows).to_have_count(0)
    page.click("#toggle-tokens")
    expect(page.locator(f"{ANSWER} > p")).to_have_text("The cat sat")


def test_a_chosen_alternative_begins_a_branch_that_is_exact_in_tokens(page: Page, asked: Asked) -> None:
    page.click("#toggle-settings")
    page.fill("#set-temperature", "0")
    page.fill("#set-system", "Be brief.")
    page.locator(".token").nth(1).hover()
    page.locator(".alternative", has_text="dog").click()
    expect(page.locator(".token")).to_have_text(["The", " dog", " ran", " off"])
    expect(page.locator(".place")).to_have_text("2/2")
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert asked["tokenize"][0] == {"model": "scripted", "messages": said, "add_generation_prompt": True}
    body = asked["completions"][0]
    assert (body["prompt"], body["temperature"], body["logprobs"]) == ([1, 2, 3, 4, 5, 10, 21], 0, 5)
    assert body["max_tokens"] == 93  # what is left of the context
    page.click("#toggle-tokens")
    expect(page.locator(f"{ANSWER} > p")).to_have_text("The dog ran off")
    page.get_by_role("button", name="Earlier branch").click()
    expect(page.locator(f"{ANSWER} > p")).to_have_text("The cat sat")


def test_a_branch_can_begin_in_a_branch(page: Page, asked: Asked) -> None:
    page.locator(".token").nth(1).hover()
    page.locator(".alternative", has_text="dog").click()
    expect(page.locator(".token")).to_have_count(4)
    page.locator(".token").nth(3).hover()
    page.locator(".alternative", has_text="on").click()
    expect(page.locator(".place")).to_have_text("3/3")
    # a plain completion does not tell the ids of alternatives: the tokenizer did
    assert asked["tokenize"][1] == {"model": "scripted", "prompt": " on", "add_special_tokens": False}
    assert asked["completions"][1]["prompt"] == [1, 2, 3, 4, 5, 10, 21, 31, 41]


def test_the_server_goes_on_from_exactly_these_tokens(page: Page, served: Served) -> None:
    page.click("#toggle-tokens")
    say(page, "Hi")
    expect(page.locator(".token")).to_have_count(13)  # the end of the turn is a token too
    served.engine.script = lambda prompt: "ey!"
    page.locator(".token").nth(1).hover()
    page.locator(".alternative", has_text="f").click()
    expect(page.locator(".token")).to_have_text(["H", "f", "e", "y", "!", ""])
    assert list(served.engine.prompts.values())[-1].endswith("user\nHi<|im_end|>\n<|im_start|>assistant\nHf")
    page.locator(".token").nth(3).hover()
    served.engine.script = lambda prompt: "."
    page.locator(".alternative", has_text="z").click()
    expect(page.locator(".place")).to_have_text("3/3")
    assert list(served.engine.prompts.values())[-1].endswith("assistant\nHfez")
    page.click("#toggle-tokens")
    expect(page.locator(f"{ANSWER} > p")).to_have_text("Hfez.")


def test_the_keyboard_walks_tokens_and_chooses(page: Page, asked: Asked) -> None:
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    expect(page.locator(".alternative")).to_have_count(2)
    page.keyboard.press("ArrowDown")
    expect(page.locator(".alternative").nth(0)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".alternative")).to_have_count(0)
    expect(page.locator(".token").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".token")).to_have_text(["The", " dog", " ran", " off"])


def test_tokens_that_are_half_a_character_are_shown_and_joined(page: Page, served: Served) -> None:
    page.click("#toggle-tokens")
    served.engine.script = lambda prompt: "\u00e9!"  # two tokens of one byte each, and a third
    say(page, "Hi")
    page.locator(".token").first.hover()
    expect(page.locator(".alternatives")).to_contain_text("<C3>")
    page.click("#toggle-tokens")
    expect(page.locator(f"{ANSWER} > p")).to_have_text("\u00e9!")


def test_an_answer_without_probabilities_says_so(page: Page, served: Served) -> None:
    say(page, "Hi")
    page.click("#toggle-tokens")
    expect(page.locator(".under").last).to_contain_text("no probabilities were kept")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".token").first).to_have_text("H")
