"""Options: frozen, helped, printed and loaded back."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import cli
from gristmill.cli.options import parse, parser_for

FROZEN = Path(__file__).with_name("options.txt")
REQUIRED = {
    "generate": ["m"],
    "batch": ["in.jsonl", "out.jsonl", "m"],
    "chat": ["m"],
    "serve": ["m"],
    "keys": ["list"],
    "import": ["m", "d"],
    "export": ["m", "d"],
    "inspect": ["m"],
    "quantize": ["m", "d"],
    "bench": ["engine", "m"],
    "assets": ["list"],
    "tokens": ["show", "f.jsonl"],
    "pretrain": ["d", "--data", "a.txt"],
}


def config_of(verb: str) -> type[Any]:
    return import_module(cli.module_of(verb)).Config  # type: ignore[no-any-return]


def every_option() -> list[str]:
    lines = []
    for verb in cli.VERBS:
        for action in parser_for(config_of(verb), verb)._actions:
            if action.dest not in ("help", "config", "print_config"):
                names = " ".join(action.option_strings) or action.dest
                lines.append(f"{verb} {names} = {action.default!r}" if action.option_strings else f"{verb} {names}")
    return lines


def test_the_options_and_their_defaults_are_frozen() -> None:
    """A change here is a change for every user: make it on purpose, in options.txt and the documentation too."""
    assert every_option() == FROZEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, option])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    for action in parser_for(config_of(verb), verb)._actions:
        assert action.help, action.dest
        assert all(name in out for name in action.option_strings)
        assert len(action.help.split()) > 1, f"{verb} {action.dest}: no docstring"


@pytest.mark.parametrize("verb", cli.VERBS)
@pytest.mark.parametrize("flag", ["--print_config", "--print_config=comments"])
def test_the_printed_configuration_loads_back_to_the_same_object(
    verb: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_options = {
        "quickstart": ["--preset", "nano", "--out", "a: b # c", "--seed", "7"],
        "generate": ["--prompt", "line\nline: 'x' # y", "--chat", "--temperature", "0", "--stop", '["a", "\\n"]'],
        "batch": ["--in_flight", "8", "--temperature", "0", "--seed", "3"],
        "chat": ["--system", "brief: yes # no", "--seed", "3", "--top_p", "0.5"],
        "serve": ["other", "--port", "0", "--adapters", '["other:null=void"]'],
        "keys": ["null-and-void", "--days", "3"],
        "import": ["--dtype", "bfloat16", "--verify"],
        "export": ["--format", "gguf", "--file_type", "q8_0", "--max_shard_size", "1GiB"],
        "inspect": ["--tensors", "--json"],
        "quantize": ["--scheme", "int4", "--method", "gptq", "--group_size", "64", "--calibration", "a: b # c"],
        "bench": ["--sweep", "[1,4]", "--quantization", "int8", "--watts", "65", "--out", "a: b # c"],
        "assets": ["--sha256", "0123", "--kind", "data"],
        "tokens": ["--ids", "--template", "chatml"],
        "pretrain": ["--objective", "electra", "--weights", "[0.5]", "--train.batch_growth", "[[100,2]]"],
        "plan": ["run", "gpt2", "--hours", "2.5", "--parallel.shard", "8", "--ladder.sizes", "[1,2,3]", "--json"],
    }[verb]
    arguments = [*REQUIRED.get(verb, []), *given_options]
    with pytest.raises(SystemExit):
        cli.main([verb, *arguments, flag])
    printed = tmp_path / "config.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    wanted = parse(config_of(verb), verb, arguments)
    assert parse(config_of(verb), verb, ["--config", str(printed)]) == wanted
    assert wanted != parse(config_of(verb), verb, REQUIRED.get(verb, []))


@settings(max_examples=25, deadline=None)
@given(prompt=st.text(min_size=1), seed=st.none() | st.integers(0, 10**9), chat=st.booleans())
def test_values_arrive_as_they_were_given(prompt: str, seed: int | None, chat: bool) -> None:
    arguments = ["m", f"--prompt={prompt}", f"--chat={str(chat).lower()}"]
    found = parse(config_of("generate"), "generate", arguments + ([] if seed is None else ["--seed", str(seed)]))
    assert (found.prompt, found.seed, found.chat) == (prompt, seed, chat)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("model: m\ntemperature: 0.1\ntop_k: 5\n", encoding="utf-8")
    found = parse(config_of("chat"), "chat", ["--config", str(file), "--temperature", "0.9"])
    assert (found.model, found.temperature, found.top_k) == ("m", 0.9, 5)
    assert parse(config_of("chat"), "chat", ["--config", str(file), "other"]).model == "other"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_an_unknown_option_is_named_and_code_2(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, *REQUIRED.get(verb, []), "--surprise", "1"])
    assert ended.value.code == 2
    assert "--surprise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["chat"], "model"),
        (["chat", "m", "surplus"], "surplus"),
        (["chat", "m", "--temperature", "warm"], "temperature"),
        (["quickstart", "--preset", "huge"], "preset"),
        (["quickstart", "--seed", "1.5"], "seed"),
        (["quickstart", "--config", "no-such.yaml"], "no-such.yaml"),
        (["generate", "m", "--chat=maybe"], "chat"),
    ],
)
def test_a_wrong_value_is_named_and_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_the_file_is_named_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("model: m\nwarmth: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", "--config", str(file)])
    assert ended.value.code == 2
    assert "warmth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.lerning_rate", "1"], "Did you mean train.learning_rate"),
        (["--objectiv", "causal"], "Did you mean objective"),  # nor is it taken for an abbreviation
        (["--objective", "casual"], "got casual. Did you mean causal"),
        (["--data", "b.txt"], "--data is given 2 times: write --data [a,b]"),
    ],
)
def test_what_is_near_a_wrong_option_is_told_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", *REQUIRED["pretrain"], *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_the_closest_key_of_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: a.txt\ntrain:\n  lerning_rate: 1\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "d", "--config", str(file)])
    assert "Did you mean train.learning_rate" in capsys.readouterr().err


def test_a_switch_of_a_group_needs_no_value_either() -> None:
    found = parse(config_of("pretrain"), "pretrain", [*REQUIRED["pretrain"], "--watch.mfu", "--train.compile", "false"])
    assert (found.watch.mfu, found.train.compile) == (True, False)


@pytest.mark.parametrize(
    ("words", "chat", "prompt"),
    [
        (["m", "--chat", "--prompt", "x"], True, "x"),
        (["--chat", "m", "--prompt", "x"], True, "x"),
        (["m", "--prompt", "x", "--chat"], True, "x"),
        (["m", "--chat", "true", "--prompt", "x"], True, "x"),
        (["m", "--chat", "false", "--prompt", "x"], False, "x"),
        (["m", "--prompt", "-"], False, "-"),
    ],
)
def test_a_switch_needs_no_value(words: list[str], chat: bool, prompt: str) -> None:
    found = parse(config_of("generate"), "generate", words)
    assert (found.model, found.chat, found.prompt) == ("m", chat, prompt)


def test_stop_strings_can_be_given_one_or_many() -> None:
    for words, wanted in ((["--stop", '["a", "b"]'], ("a", "b")), (["--stop", "[a]"], ("a",)), ([], ())):
        assert tuple(asdict(parse(config_of("chat"), "chat", ["m", *words]))["stop"]) == wanted
