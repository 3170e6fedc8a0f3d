"""gristmill plan: the whole answer for a model or a limit, and errors that name what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gristmill import cli
from gristmill.errors import GristmillError
from gristmill.scale.budget import Tier
from gristmill.scale.memory import TrainingSettings
from gristmill.scale.plan import PlanRequest, make_plan, model_config
from gristmill.train.parallel.layout import Parallel


def test_a_model_without_a_limit_is_planned_at_twenty_tokens_a_parameter() -> None:
    facts = make_plan(PlanRequest(model="gpt2", device="h100", mfu=0.5, price=2.0), layout=Parallel(shard=4))
    assert facts["parameters"] == 124_439_808
    assert facts["tokens"] == 20 * facts["matrix_parameters"]
    assert facts["flops"] > facts["flops_6nd"] == 6 * facts["matrix_parameters"] * facts["tokens"]
    assert facts["seconds"] == pytest.approx(facts["flops"] / (4 * 989e12 * 0.5))
    assert facts["dollars"] == pytest.approx(facts["seconds"] / 3600 * 4 * 2.0)
    assert facts["fits"]
    json.dumps(facts, allow_nan=False)


def test_the_tightest_of_several_limits_binds() -> None:
    options: dict[str, Any] = {"flops": 1.08e20, "hours": 1e5, "dollars": 1e7, "price": 2.0}
    loose = make_plan(PlanRequest(**options))
    assert (loose["binding"], loose["planned_parameters"]) == ("operations", pytest.approx(0.949e9, rel=1e-3))
    assert loose["matrix_parameters"] == pytest.approx(0.949e9, rel=0.15)
    assert make_plan(PlanRequest(**{**options, "hours": 1.0}))["binding"] == "time"
    assert make_plan(PlanRequest(**{**options, "dollars": 10.0}))["binding"] == "money"
    data = make_plan(PlanRequest(**options, unique_tokens=1e9))
    assert (data["binding"], data["tokens"], data["epochs"]) == ("data", 4e9, 4.0)
    assert 3.5e9 < data["effective_tokens"] < 4e9


def test_hours_buy_as_many_operations_whoever_counts() -> None:
    """Time and money of the plan are the limits it was made from."""
    request = PlanRequest(model="llama2-7b", hours=100.0, dollars=1e9, price=3.0)
    facts = make_plan(request, layout=Parallel(shard=8))
    assert (facts["binding"], facts["seconds"]) == ("time", pytest.approx(360_000))
    assert facts["dollars"] == pytest.approx(100 * 8 * 3.0)


def test_advice_is_taken_from_layouts_that_do_fit() -> None:
    settings = TrainingSettings(tokens=16384, sequence=4096, precision="bfloat16")
    facts = make_plan(PlanRequest(model="llama2-7b", device="a100-80gb"), settings)
    assert not facts["fits"]
    ways = int(facts["advice"][-1].split()[1])
    assert "--parallel.shard" in facts["advice"][-1]
    checkpointing = "checkpoint_activations" in facts["advice"][-1]
    tokens = 8192 if "tokens" in facts["advice"][-1] else 16384
    better = TrainingSettings(tokens=tokens, sequence=4096, precision="bfloat16", checkpoint_activations=checkpointing)
    again = make_plan(PlanRequest(model="llama2-7b", device="a100-80gb"), better, Parallel(shard=ways))
    assert again["fits"]


def test_bought_data_are_planned_with_the_compute() -> None:
    request = PlanRequest(
        dollars=70e3,
        price=2.0 * 989 * 0.4,
        data_dollars=25e3,
        tiers=(Tier(name="curated", dollars_per_1k=0.015),),
        reserve_dollars=5e3,
        epochs=1,
    )
    facts = make_plan(request)
    assert facts["binding"] == "data"
    assert facts["limits"]["compute"]["parameters"] == pytest.approx(1.02e9, rel=0.005)
    assert facts["tokens"] == pytest.approx(1.67e9, rel=0.003)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gtp2"}, "gpt2"),
        ({"model": "t5-base"}, "encoder with a decoder"),
        ({"model": "gpt2", "device": "h1000"}, "h100"),
        ({"flops": -1.0}, "flops"),
        ({"flops": 1e20, "mfu": 1.5}, "mfu"),
        ({"dollars": 5.0}, "price"),
        ({"flops": 1e20, "data_dollars": 5.0}, "tiers"),
        ({"model": "gpt2", "tiers": (Tier(name="a", dollars_per_1k=1),), "dollars": 1.0, "price": 1.0}, "leave out"),
    ],
)
def test_bad_requests_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        make_plan(PlanRequest(**options))


def test_the_command_tells_the_same_figures_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "run", "gpt2", "--hours", "2", "--parallel.shard", "8", "--training.precision", "bfloat16"]
    assert cli.main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["devices"], facts["binding"], facts["seconds"]) == (8, "time", pytest.approx(7200))
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    for expected in ("gpt2: 12 layers of 768", "124M", "<- binds", "2.0 hours on 8 h100", "peak", "optimiser"):
        assert expected in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give a model"),
        (["plan", "run", "gpt2", "--ladder.seed", "3"], "plan ladder"),
        (["plan", "ladder", "--hours", "3"], "--hours belongs to: gristmill plan run"),
        (["plan", "ladder"], "--ladder.data"),
    ],
)
def test_options_of_the_other_action_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_dry_run_tells_what_each_process_holds_and_sends(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "dry",
        "nano",
        "--parallel.tensor",
        "2",
        "--training.tokens",
        "256",
        "--training.sequence",
        "64",
    ]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().out
    assert "all-reduce" in told
    shape = model_config("nano")
    assert f"layers.0.self_attn.o_proj.weight [{shape.hidden_size}, {shape.query_size // 2}]" in told
    assert cli.main([*arguments, "--hours", "3"]) == 1
    assert cli.main(["plan", "dry", "nano", "--parallel.tensor", "3"]) == 1
    assert "must divide" in capsys.readouterr().err
