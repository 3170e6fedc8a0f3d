"""`gristmill tokens show`."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from conformance.renderer import DIALOGUE, conversations
from gristmill.cli import main
from gristmill.core import Message
from gristmill.errors import DataError
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.show import runs, show, show_file
from tokens.formats import BY_NAME, LLAMA3

CHAT = BY_NAME["chatml"].tokenizer
RENDERER = JinjaRenderer(CHAT)


def lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@settings(max_examples=30, deadline=None)
@given(conversations())
def test_runs_joined_are_the_text(messages: list[Message]) -> None:
    rendered = RENDERER.render(messages)
    assert "".join(text for _, text in runs(rendered)) == rendered.text


def test_answers_stand_in_brackets_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    rendered = RENDERER.render(DIALOGUE)
    show(rendered, "talk", out, ids=True)
    text = out.getvalue()
    assert "<|im_start|>assistant\n\u27e6Forty metres.<|im_end|>\u27e7\n" in text
    assert "\x1b" not in text
    assert f"talk: {len(rendered.token_ids)} tokens, {sum(rendered.loss_mask)} learned" in text
    assert text.count("learned  '") == sum(rendered.loss_mask)


def test_answers_are_highlighted_on_a_terminal_and_cannot_steer_it() -> None:
    out = io.StringIO()
    show(RENDERER.render([{"role": "user", "content": "[red]\x1b[2J"}, *DIALOGUE[1:]]), "talk", out, colour=True)
    assert "\x1b[" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "[red]\u241b[2J" in out.getvalue()


def test_command_shows_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHAT.save(tmp_path / "model")
    file = lines(tmp_path / "talks.jsonl", {"messages": DIALOGUE}, {"messages": DIALOGUE[:2]})
    assert main(["tokens", "show", str(file), "--tokenizer", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "talks.jsonl line 1:" in text
    assert "talks.jsonl line 2:" in text
    assert text.count("\u27e6") == 3


def test_command_takes_a_template_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BY_NAME["llama3"].tokenizer.save(tmp_path)
    (tmp_path / "mine.jinja").write_text(LLAMA3)
    file = lines(tmp_path / "talks.jsonl", {"messages": DIALOGUE})
    common = ["tokens", "show", str(file), "--tokenizer", str(tmp_path), "--template"]
    assert main([*common, str(tmp_path / "mine.jinja")]) == 0
    assert "\u27e6Forty metres.<|eot_id|>\u27e7" in capsys.readouterr().out
    assert main([*common, "chatm"]) == 1
    assert "Did you mean chatml?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"text": "x"}, 'field "messages" is missing (found: text)'),
        ({"messages": "x"}, 'field "messages" must be a list'),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "message 0: content spells the special token"),
        ([1], "expected a JSON object"),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: object, reason: str
) -> None:
    CHAT.save(tmp_path)
    file = lines(tmp_path / "talks.jsonl", {"messages": DIALOGUE}, second)
    assert main(["tokens", "show", str(file), "--tokenizer", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{file} line 2: " in error
    assert reason in error


def test_a_json_file_holds_one_conversation_or_a_list(tmp_path: Path) -> None:
    one, many = lines(tmp_path / "one.json", {"messages": DIALOGUE}), tmp_path / "many.json"
    assert show_file(one, RENDERER, io.StringIO()) == 1
    assert show_file(lines(many, [{"messages": DIALOGUE}] * 2), RENDERER, io.StringIO()) == 2
    with pytest.raises(DataError, match=r"many\.json item 1: the conversation is empty"):
        show_file(lines(many, [{"messages": DIALOGUE}, {"messages": []}]), RENDERER, io.StringIO())
    many.write_text('[{"messages":\n nonsense}]')
    with pytest.raises(DataError, match=r"many\.json line 2, column 2: not JSON"):
        show_file(many, RENDERER, io.StringIO())


@pytest.mark.parametrize("name", ["none.jsonl", "none.json"])
def test_a_missing_or_empty_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        show_file(tmp_path / name, RENDERER, io.StringIO())
    (tmp_path / name).write_text("[]" if name.endswith("json") else "\n")
    with pytest.raises(DataError, match="holds no conversation"):
        show_file(tmp_path / name, RENDERER, io.StringIO())


@pytest.mark.asset
def test_the_real_model_renders_with_its_own_template() -> None:
    from gristmill.model.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    renderer = JinjaRenderer(tokenizer)
    rendered = renderer.render(DIALOGUE)
    assert rendered.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.token_ids == tokenizer.encode(rendered.text, add_bos=False)
    assert [text for mask, text in runs(rendered) if mask] == ["Forty metres.<|im_end|>", "About a mile.<|im_end|>"]
