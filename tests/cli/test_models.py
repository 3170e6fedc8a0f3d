"""generate and chat on a tiny model, in pipes and with wrong input."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gristmill import LLM, SamplingParams, cli
from gristmill.cli import chat as chat_verb
from gristmill.cli.sampling import Sampling
from gristmill.cli.stream import stream
from gristmill.errors import RequestError
from gristmill.model.config import ModelConfig
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.transformer import Transformer
from gristmill.tokens.train import train_bpe

CONTEXT = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned nothing, with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("models") / "tiny-model"
    tokenizer = train_bpe(["The river runs to the sea, and the sea is wide."] * 3, 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    network = Transformer(config)
    network.initialise(0)
    save_huggingface(network, directory, stop_token_ids=tokenizer.stop_token_ids)
    tokenizer.save(directory)
    return str(directory)


def pipe(monkeypatch: pytest.MonkeyPatch, data: str | bytes) -> None:
    raw = data.encode() if isinstance(data, str) else data
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_generate_prints_what_the_library_returns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = LLM(model).generate("The river", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    found = out(capsys, "generate", model, "--prompt", "The river", "--temperature", "0", "--max_tokens", "20")
    assert found == wanted + "\n"
    assert wanted


def test_generate_reads_the_prompt_from_standard_input(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = ("--temperature", "0", "--max_tokens", "12")
    wanted = out(capsys, "generate", model, "--prompt", "The\nsea ", *greedy)
    pipe(monkeypatch, "The\nsea ")
    assert out(capsys, "generate", model, "--prompt", "-", *greedy) == wanted


def test_generate_can_use_the_chat_template(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(model)
    wanted = llm.chat([{"role": "user", "content": "Sea?"}], SamplingParams(temperature=0, max_tokens=9))
    found = out(capsys, "generate", model, "--chat", "--prompt", "Sea?", "--temperature", "0", "--max_tokens", "9")
    assert found == wanted[0].outputs[0].text + "\n"


def test_a_seed_repeats_the_draw(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, -1):
        drawn = [out(capsys, "generate", model, "--prompt", "a", "--seed", str(number)) for number in (seed, seed, 7)]
        assert drawn[0] == drawn[1] != drawn[2]
    free = [out(capsys, "generate", model, "--prompt", "a") for _ in range(2)]
    assert free[0] != free[1]


def test_an_answer_cut_short_is_told(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", model, "--prompt", "a", "--temperature", "0", "--max_tokens", "3"]) == 0
    assert "[stopped after 3 tokens]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "sea " * 200], f"tokens; the context of {CONTEXT} leaves no room"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 or more"),
        (["--prompt", "a", "--top_p", "2"], "top_p must be in"),
        (["--prompt", "a", "--max_tokens", "0"], "max_tokens must be at least 1"),
        (["--prompt", "a", "--dtype", "float8"], "dtype 'float8' is not one of"),
        (["--prompt", "a", "--stop", '[""]'], "stop must be without empty strings"),
        (["--prompt", "a", "--seed", str(2**80)], "64-bit"),
        (["--prompt", "half \udc80"], "surrogate"),
    ],
)
def test_bad_input_is_one_clear_line_and_code_1(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", model, *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("gristmill: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("verb", [["generate", "--prompt", "-"], ["chat"]])
def test_input_that_is_no_utf_8_is_code_1(
    model: str, verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, b"caf\xe9\n")
    assert cli.main([verb[0], model, *verb[1:]]) == 1
    assert "standard input: not UTF-8" in capsys.readouterr().err


def test_an_unknown_model_offers_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["generate", "smolm2-135m", "--prompt", "a"], ["chat", "smolm2-135m"]):
        assert cli.main(verb) == 1
        assert "smollm2-135m" in capsys.readouterr().err


def test_a_path_that_holds_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name, message in (("gone/model", "no such file"), ("empty", "no model here"), ("notes.txt", "neither a GGUF")):
        assert cli.main(["generate", str(tmp_path / name), "--prompt", "a"]) == 1
        message_found = capsys.readouterr().err
        assert message in message_found
        assert name in message_found


class Scripted:
    """Watches what `chat` renders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[str]] = []
        original = chat_verb.LLM

        def make(*arguments: object, **keywords: object) -> LLM:
            llm = original(*arguments, **keywords)  # type: ignore[arg-type]
            render = llm.renderer.render_prompt

            def watched(messages: list[dict[str, str]]) -> list[int]:
                self.asked.append([f"{message['role']}: {message['content']}" for message in messages])
                return render(messages)  # type: ignore[arg-type]

            object.__setattr__(llm.renderer, "render_prompt", watched)
            return llm

        monkeypatch.setattr(chat_verb, "LLM", make)


def test_chat_through_a_pipe(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Scripted(monkeypatch)
    pipe(monkeypatch, "Hi\n\n  More?  \n/new\nAgain\n/quit\nNever\n")
    options = ["--system", "Be.", "--temperature", "0", "--max_tokens", "5", "--stop", '["\\n"]']
    assert cli.main(["chat", model, *options]) == 0
    captured = capsys.readouterr()
    first, second, third = watched.asked
    assert first == ["system: Be.", "user: Hi"]
    answer = second[2].removeprefix("assistant: ")
    assert second == ["system: Be.", "user: Hi", f"assistant: {answer}", "user: More?"]
    assert third == ["system: Be.", "user: Again"]
    lines = captured.out.split("\n")
    assert len(lines) == 4, "three answers, nothing else"
    assert lines[0] == answer
    assert captured.err == ""


def test_the_answer_in_the_conversation_is_the_answer_printed(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(model)
    params = SamplingParams(temperature=0, max_tokens=5)
    first = llm.chat([{"role": "user", "content": "Hi"}], params)[0].outputs[0].text
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]
    second = llm.chat([*turns, {"role": "user", "content": "Go"}], params)[0].outputs[0].text  # type: ignore[list-item]
    pipe(monkeypatch, "Hi\nGo")
    assert out(capsys, "chat", model, "--temperature", "0", "--max_tokens", "5") == f"{first}\n{second}\n"


def test_a_message_beyond_the_context_is_told_and_forgotten(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = Scripted(monkeypatch)
    pipe(monkeypatch, f"Hi\n{'sea ' * 300}\nGo\n")
    assert cli.main(["chat", model, "--temperature", "0", "--max_tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "leaves no room for an answer" in captured.err
    assert "/new" in captured.err
    assert captured.err.count("\n") == 1
    assert [entry for entry in watched.asked[-1] if entry.startswith("user")] == ["user: Hi", "user: Go"]


def test_the_answer_never_asks_for_more_than_the_context_holds() -> None:
    sampling = Sampling(max_tokens=50)
    assert [sampling.params(room=room).max_tokens for room in (100, 50, 7, 0, -3)] == [50, 50, 7, 1, 1]
    for field in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        value = {"top_k": 3, "seed": 5}.get(field, 0.5)
        assert getattr(Sampling(**{field: value}).params(room=9), field) == value
    assert Sampling(stop=("a",)).params(room=9).stop_strings == ("a",)
    with pytest.raises(RequestError, match="max_tokens"):
        Sampling(max_tokens=0).params(room=9)


def test_an_interrupted_stream_frees_its_memory(model: str) -> None:
    llm = LLM(model)

    class Closing(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(llm.engine, "The river", SamplingParams(temperature=0, max_tokens=8), Closing())
    assert not llm.engine.has_unfinished()
    llm.engine.check_integrity()


def command(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "gristmill", *arguments], env=environment, **options)  # type: ignore[call-overload,no-any-return]


def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(model: str) -> None:
    """One process waits for a line and is interrupted; the other one's reader goes away in the middle."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    interrupted, closed = command("chat", model, **pipes), command("chat", model, "--max_tokens", "60", **pipes)
    assert interrupted.stdin is not None
    interrupted.stdin.write(b"Hi\n")
    interrupted.stdin.flush()
    assert interrupted.stdout is not None
    assert interrupted.stdout.read(1), "it has answered"
    time.sleep(0.3)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert errors == b"\ngristmill: interrupted\n"
    assert closed.stdout is not None
    closed.stdout.close()
    closed.stdout = None
    _, errors = closed.communicate(b"Hi\nGo\n" * 20, timeout=60)
    assert errors == b""
    assert closed.returncode == 141


def test_float16_and_bfloat16_models_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("bfloat16", "float16"):
        assert out(capsys, "generate", model, "--prompt", "a", "--dtype", dtype, "--max_tokens", "4").strip()
    assert torch.get_default_dtype() == torch.float32
