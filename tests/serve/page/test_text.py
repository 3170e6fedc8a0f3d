"""What an answer looks like: Markdown, code, maths, reasoning and calls of tools; and hostile text."""

from __future__ import annotations

import json

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

from serve.conftest import Served
from serve.page.conftest import answer_with, delta, events, say

Page = sync_api.Page
ANSWER = ".message.assistant > .text"

DOCUMENT = r"""
# Title with *stress*

A **bold** word, `x < y`, ~~gone~~ and [a link](https://example.org/a?b=c).

1. one
   - inner
2. two

- [x] done

> quoted

| a | b |
|:--|--:|
| 1 | 2 |

```python
def add(a, b):  # both are numbers
    return "sum", a + b
```

It costs $5 or $6 &amp; more; $a^2$ and \(b\).

$$\frac{1}{2}$$
""".strip()

HOSTILE = [
    '<img src=x onerror="document.title=1"><script>document.title=2</script>',
    '<svg onload="document.title=3"><iframe src="javascript:document.title=4"></iframe>',
    "[a](javascript:document.title=5) [b](data:text/html,<script>1</script>) <javascript:alert(1)>",
    '![image](https://example.org/spy.png) ![x](x" onerror="document.title=6)',
    '```"><img src=x onerror=document.title=7>\n</code></pre><script>document.title=8</script>\n```',
    r"$\href{javascript:document.title=9}{x}$ $\includegraphics{https://example.org/spy.png}$ $\htmlData{a=b}{x}$",
    "| <b onclick=alert(1)>x</b> |\n|--|\n| <style>*{display:none}</style> |",
]


def test_markdown_becomes_the_right_elements(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: DOCUMENT
    say(page, "x")
    text = page.locator(ANSWER)
    expect(text.locator("h3")).to_have_text("Title with stress")
    expect(text.locator("p strong")).to_have_text("bold")
    expect(text.locator("p > code")).to_have_text("x < y")
    expect(text.locator("del")).to_have_text("gone")
    expect(text.locator("a")).to_have_attribute("href", "https://example.org/a?b=c")
    expect(text.locator("a")).to_have_attribute("rel", "noopener noreferrer")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol ul > li")).to_have_text("inner")
    expect(text.locator("li.task input")).to_be_checked()
    expect(text.locator("blockquote")).to_have_text("quoted")
    expect(text.locator("td.right")).to_have_text("2")
    expect(text.locator("pre .keyword")).to_have_text(["def", "return"])
    expect(text.locator("pre .comment")).to_have_text("# both are numbers")
    expect(text.locator("p", has_text="It costs")).to_contain_text("It costs $5 or $6 & more;")
    expect(text.locator("p .maths .katex")).to_have_count(2)
    expect(text.locator("div.maths .katex-display")).to_have_count(1)
    assert page.evaluate("document.fonts.check('16px KaTeX_Main')")


def test_code_can_be_copied(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: "```js\nlet a = '<b>';\n```"
    say(page, "x")
    page.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "let a = '<b>';"


HANDLERS = (
    """[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on'))"""
)


@pytest.mark.parametrize("attack", HOSTILE)
def test_text_is_never_markup(page: Page, served: Served, attack: str) -> None:
    served.engine.script = lambda prompt: attack
    say(page, attack)
    expect(page.locator(".message.user .text")).to_have_text(attack)
    expect(page.locator(ANSWER)).to_be_visible()
    for _ in range(2):
        page.wait_for_load_state("networkidle")
        forbidden = ".messages :is(img, script, iframe, svg:not(.katex svg), style, b, object, embed, form)"
        assert page.locator(forbidden).count() == 0
        addresses = page.locator(".messages a").evaluate_all("all => all.map((a) => a.protocol)")
        assert set(addresses) <= {"https:", "http:", "mailto:"}
        assert page.evaluate(HANDLERS) == []
        page.reload()
        expect(page.locator(ANSWER)).to_be_visible()
    assert not page.title().isdigit()


def test_absurd_text_does_not_break_the_page(page: Page, served: Served) -> None:
    for text in (
        ">" * 30_000,
        "[" * 20_000,
        "* " * 5_000,
        "\\frac{" * 50,
        "$" * 3_000,
        "`" * 9_999 + "x",
        "- " * 3_000,
    ):
        answer_with(page, "/v1/chat/completions", lambda body, text=text: (200, events(delta(content=text)), {}))
        say(page, "x")
        expect(page.locator(ANSWER).last).to_be_visible()
        page.unroute("**/v1/chat/completions")
    expect(page.locator(".failure:visible")).to_have_count(0)


def test_blocks_that_are_complete_stay_while_the_answer_grows(page: Page, served: Served) -> None:
    served.engine.script = lambda prompt: "first paragraph\n\n" + "second " * 30
    served.engine.step_seconds = 0.005
    page.fill("#input", "x")
    page.press("#input", "Enter")
    expect(page.locator(f"{ANSWER} > p")).to_have_count(2)
    expect(page.locator(f"{ANSWER} > p").last).to_contain_text("second")
    page.evaluate(f"document.querySelector('{ANSWER} > p').marked = true")
    expect(page.locator(f"{ANSWER} > p").last).to_contain_text("second " * 8)
    assert page.evaluate(f"document.querySelector('{ANSWER} > p').marked") is True


def test_reasoning_is_folded_and_not_sent_back(page: Page, served: Served) -> None:
    stream = events(
        delta(role="assistant"),
        delta(reasoning_content="Let me "),
        delta(reasoning_content="see."),
        delta(content="42"),
    )
    bodies = answer_with(page, "/v1/chat/completions", lambda body: (200, stream, {}))
    say(page, "What?")
    expect(page.locator(ANSWER)).to_have_text("42")
    thoughts = page.locator(".reasoning .text")
    expect(thoughts).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(thoughts).to_have_text("Let me see.")
    say(page, "Sure?")
    assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_calls_are_readable_and_their_results_go_on(page: Page, served: Served) -> None:
    def part(**fields: object) -> dict[str, object]:
        return delta(tool_calls=[{"index": 0, **fields}])

    calls = events(
        part(id="call_1", type="function", function={"name": "weather", "arguments": ""}),
        part(function={"arguments": '{"place": "Br'}),
        part(function={"arguments": 'no", "days": 2}'}),
    )
    answers = iter([calls, events(delta(content="It rains."))])
    bodies = answer_with(page, "/v1/chat/completions", lambda body: (200, next(answers), {}))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    page.click("#toggle-settings")
    page.fill("#set-tools", json.dumps(tools))
    say(page, "Weather?")
    card = page.locator(".tool-call")
    expect(card.locator("h3")).to_have_text("Calls weather")
    expect(card.locator("dt")).to_have_text(["place", "days"])
    expect(card.locator("dd")).to_have_text(["Brno", "2"])
    card.get_by_label("Result of weather").fill("rain")
    card.get_by_text("Send result").click()
    expect(page.locator(ANSWER).last).to_have_text("It rains.")
    assert bodies[0]["tools"] == tools
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"place": "Brno", "days": 2}'},
    }
    assert bodies[1]["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
