"""Probes are scored as their definition says, asked at checkpoints, and ask things that make sense."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.corpus.loader import PackedLoader
from gristmill.corpus.shards import TokenList
from gristmill.errors import DataError, GristmillError
from gristmill.model.encoder import Encoder
from gristmill.model.transformer import Transformer
from gristmill.objectives.causal import CausalLM
from gristmill.tokens.train import train_bpe
from gristmill.train.callbacks import Run
from gristmill.train.loop import train
from gristmill.train.metrics import read_metrics
from gristmill.train.watch.probes import (
    Probe,
    ProbeTasks,
    all_probes,
    arithmetic_probes,
    code_probes,
    fact_probes,
    score_probes,
)
from train.toy import CONFIG, toy_config, weights

TOKENIZER = train_bpe(["The capital of France is Paris. 1 + 1 = 2\nfor i in range(10):"], 280)


def model_for(opinions: float = 20.0, **changes: Any) -> Transformer:
    """With strong opinions, so that no two options are nearly equal."""
    config = replace(CONFIG, **{"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 128, **changes})
    model = Transformer(config)
    model.initialise(0)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(opinions)
    return model


def test_scores_equal_one_forward_pass_per_option_and_greedy_decoding() -> None:
    model, probes = model_for(), all_probes()
    found = score_probes(model, TOKENIZER, probes)
    for kind in ("arithmetic", "facts", "code"):
        asked = [probe for probe in probes if probe.kind == kind]
        right = exact = 0
        for probe in asked:
            prompt, sums = TOKENIZER.encode(probe.prompt), []
            for option in (probe.answer, *probe.wrong):
                ids = TOKENIZER.encode(option)
                logprobs = model(torch.tensor(prompt + ids)).detach().log_softmax(-1)
                sums.append(sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)))
            right += max(sums) == sums[0]
            written, answer = list(prompt), TOKENIZER.encode(probe.answer)
            while len(written) < len(prompt) + len(answer):
                written.append(int(model(torch.tensor(written))[-1].argmax()))
            exact += written[len(prompt) :] == answer
        expected = right / len(asked)
        assert found[kind]["right"] == expected
        assert found[kind]["exact"] == exact / len(asked)
        assert found[kind]["samples"] == len(asked)
        assert found[kind]["standard_error"] == pytest.approx((expected * (1 - expected) / len(asked)) ** 0.5)
        assert found[kind]["chance"] == pytest.approx(sum(1 / (1 + len(p.wrong)) for p in asked) / len(asked))


def test_a_model_that_has_learnt_the_answers_is_right_and_writes_them(tmp_path: Path) -> None:
    probes = fact_probes()[:6]
    documents = [(TOKENIZER.encode(probe.prompt + probe.answer), None) for probe in probes]
    loader = PackedLoader(
        TokenList(documents, vocab_size=TOKENIZER.vocab_size), row_length=64, rows_per_batch=4, seed=0
    )
    model = model_for(hidden_size=32, intermediate_size=64, opinions=1.0)
    before = score_probes(model, TOKENIZER, probes)["facts"]
    tasks = ProbeTasks(TOKENIZER, probes)
    train(model, CausalLM(), loader, toy_config(steps=130, checkpoint_every=60), tmp_path, callbacks=[tasks])
    after = score_probes(model, TOKENIZER, probes)["facts"]
    assert before["exact"] == 0.0
    assert (after["right"], after["exact"]) == (1.0, 1.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "probes" in record] == [60, 120, 130]
    assert records[-1]["probes"] == {"facts": after}


@pytest.mark.parametrize("average", [None, 0.5])
def test_asking_changes_neither_weights_nor_mode(tmp_path: Path, average: float | None) -> None:
    loader = PackedLoader(
        TokenList([(TOKENIZER.encode("The capital of France"), None)] * 9, vocab_size=TOKENIZER.vocab_size),
        row_length=32,
        rows_per_batch=2,
        seed=0,
    )
    ends = []
    for number, callbacks in enumerate(([], [ProbeTasks(TOKENIZER)])):
        model = model_for()
        config = toy_config(steps=4, checkpoint_every=2, average=average)
        train(model, CausalLM(), loader, config, tmp_path / str(number), callbacks=callbacks)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    model.train()
    score_probes(model, TOKENIZER, arithmetic_probes()[:1])
    assert model.training


def test_the_sets_are_right() -> None:
    for probe in arithmetic_probes():
        *_, last = probe.prompt.splitlines()
        assert eval_sum(last.removesuffix(" =")) == int(probe.answer)
        assert all(int(wrong) != int(probe.answer) for wrong in probe.wrong)
    for probe in code_probes():
        program = probe.prompt + probe.answer
        for tail in ("", "\n    pass", "\n        pass", " pass"):
            try:
                ast.parse(program + tail)
                break
            except SyntaxError:
                continue
        else:
            raise AssertionError(program)
    prompts = [probe.prompt for probe in all_probes()]
    assert len(set(prompts)) == len(prompts) >= 40
    assert all(min(len(p.wrong) for p in kind()) >= 2 for kind in (arithmetic_probes, fact_probes, code_probes))


def eval_sum(text: str) -> int:
    left, sign, right = re.fullmatch(r"(\d+) ([+-]) (\d+)", text).groups()  # type: ignore[union-attr]
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(DataError, match="wrong answers"):
        Probe("x", "a", " b", (" b",))
    with pytest.raises(DataError, match="context of 4"):
        score_probes(model_for(max_position_embeddings=4), TOKENIZER, arithmetic_probes())
    run = Run(Encoder(replace(CONFIG, causal=False)), None, None, None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(GristmillError, match="decoder"):
        ProbeTasks(TOKENIZER).start(run)
