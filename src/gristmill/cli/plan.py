"""`gristmill plan [run|ladder]`: size, time, money and memory before the run; or a ladder of small runs that tests the
law by which larger ones are foreseen."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from gristmill.errors import GristmillError
from gristmill.scale.ladder import LadderConfig
from gristmill.scale.memory import TrainingSettings
from gristmill.scale.plan import PlanRequest, make_plan, model_config
from gristmill.train.parallel.layout import Parallel


@dataclass(frozen=True, kw_only=True)
class _Action:
    """The first word: fields of the class named last come first."""

    action: Literal["run", "dry", "ladder"] = field(default="run", metadata={"positional": True})
    """run tells a plan; dry pretends to be every process of a layout; ladder trains small models to test the law."""


@dataclass(frozen=True, kw_only=True)
class Config(PlanRequest, _Action):
    """gristmill plan [run [MODEL]]: parameters, tokens, time, money and memory of a training run, and what binds.

    gristmill plan dry MODEL --parallel.shard 8: shapes, bytes and traffic of each process, counted on one.
    gristmill plan ladder --ladder.data SHARDS: train small models, fit the scaling law, foretell the next, check it.
    """

    model: str = field(default="", metadata={"positional": True})
    """run: a preset, a published model or a checkpoint; empty lets the limits choose. Also the word behind run."""
    json: bool = False
    """Print one JSON object."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """run: what of the training decides its memory."""
    parallel: Parallel = field(default_factory=Parallel)
    """run: how many ways the run is split; the product is the number of devices."""
    ladder: LadderConfig = field(default_factory=LadderConfig)
    """ladder: its sizes, data and directory."""


def run(config: Config) -> int:
    """Tell the plan, or climb the ladder; 130 when that is interrupted. Raises GristmillError for what does not fit."""
    if config.action == "ladder":
        return _ladder(config)
    if config.ladder != LadderConfig():
        raise GristmillError("options --ladder.* belong to: gristmill plan ladder")
    if config.action == "dry":
        return _dry(config)
    request = PlanRequest(**{name.name: getattr(config, name.name) for name in dataclasses.fields(PlanRequest)})
    if not request.model and not any((request.flops, request.hours, request.dollars, request.tokens)):
        raise GristmillError(
            "give a model (gristmill plan run gpt2) or a limit that chooses its size: --flops, --hours, --dollars with "
            "--price, or --tokens"
        )
    facts = make_plan(request, config.training, config.parallel)
    if config.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        _show(facts)
    return 0


def _dry(config: Config) -> int:
    from gristmill.train.config import TrainConfig
    from gristmill.train.parallel.dry_run import dry_run

    known = dataclasses.replace(
        Config(), action="dry", model=config.model, training=config.training, parallel=config.parallel
    )
    if config != known:
        raise GristmillError("gristmill plan dry takes MODEL, --training.* and --parallel.* alone")
    settings, layout = config.training, config.parallel
    steps = TrainConfig(
        steps=1,
        micro_batches=settings.micro_batches * layout.shares,
        precision=settings.precision,
        optimiser=settings.optimiser,
        checkpoint_activations=settings.checkpoint_activations,
    )
    shape = model_config(config.model)
    found = dry_run(shape, layout, layout.processes, steps, tokens=settings.tokens, sequence=settings.sequence)
    print("\n".join(found.lines(shapes=True)))
    return 0


def _ladder(config: Config) -> int:
    from gristmill.cli.ladder_report import write_ladder_report
    from gristmill.scale.ladder import climb

    plain = dataclasses.replace(Config(), action="ladder", ladder=config.ladder, json=config.json)
    for option in dataclasses.fields(config):
        if getattr(config, option.name) != getattr(plain, option.name):
            raise GristmillError(f"option --{option.name} belongs to: gristmill plan run")
    try:
        found = climb(config.ladder)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here ({config.ladder.out}).", file=sys.stderr)
        return 130
    report = write_ladder_report(config.ladder, found)
    if config.json:
        print(json.dumps(found.facts(), indent=2, allow_nan=False))
        return 0
    for verdict in report.verdicts:
        print(verdict)
    print(f"Report: {config.ladder.directory / 'report.html'}")
    return 0


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for title, rows in _sections(facts).items():
        table = Table("part", "figure", title=title, title_justify="left", box=None, show_header=False)
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
        console.print()


def _sections(facts: dict[str, Any]) -> dict[str, dict[str, str]]:
    limits = {
        f"{name} allows": f"{_count(limit['parameters'])} parameters on {_count(limit['tokens'])} tokens"
        + ("  <- binds" if name == facts["binding"] else "")
        for name, limit in facts["limits"].items()
    }
    size = {
        "model": f"{facts['model']}: {facts['layers']} layers of {facts['hidden_size']}",
        "parameters": f"{_count(facts['parameters'])} ({_count(facts['matrix_parameters'])} in matrix products)",
        "tokens": f"{_count(facts['tokens'])}, {facts['tokens'] / facts['planned_parameters']:.3g} a parameter, "
        f"{facts['steps']:,.0f} steps of {facts['tokens_per_step']:,}",
        **limits,
    }
    if "epochs" in facts:
        size["epochs"] = f"{facts['epochs']:.2f}, worth {_count(facts['effective_tokens'])} different tokens"
    best = facts["chinchilla_optimal"]
    size["Chinchilla law"] = (
        f"loss {facts['chinchilla_loss']:.3f}; best at this compute {best['loss']:.3f}, "
        f"{_count(best['parameters'])} on {_count(best['tokens'])} tokens"
    )
    money = "" if facts["dollars"] is None else f", {facts['dollars']:,.0f} dollars"
    cost = {
        "operations": f"{facts['flops']:.3g} FLOP with attention (6 N D: {facts['flops_6nd']:.3g})",
        "time": f"{_time(facts['seconds'])} on {facts['devices']} {facts['device']} "
        f"at an assumed {facts['mfu']:.0%} of the peak",
        "device-hours": f"{facts['device_hours']:,.1f}{money}",
    }
    memory = {name: _bytes(value) for name, value in facts["memory"].items()}
    memory["peak"] = f"{_bytes(facts['peak'])} (during: {facts['moment']})"
    memory["fits"] = f"{'yes' if facts['fits'] else 'NO'}: {facts['device']} has {_bytes(facts['device_memory'])}"
    memory |= {f"would fit ({number})": option for number, option in enumerate(facts["advice"], start=1)}
    memory |= {f"serving, 16 bits: {name}": _bytes(value) for name, value in facts["serving"].items() if value}
    sections = {"Size": size, "Cost": cost, "Memory of a training step, each device": memory}
    if "stages" in facts:
        sections["Money"] = _money(facts)
    return sections


def _money(facts: dict[str, Any]) -> dict[str, str]:
    rows = {"verdict": facts["verdict"]}
    rows |= {f"buy {name}": f"{_count(tokens)} tokens" for name, tokens in facts["mixture"].items()}
    rows["data"] = f"{facts['data_dollars']:,.0f} dollars"
    for number, stage in enumerate(facts["stages"], start=1):
        rows[f"stage {number}"] = (
            f"{_count(stage['parameters'])} on {_count(stage['tokens'])} tokens, {stage['dollars']:,.2f} dollars"
        )
    short = " (the rehearsals do not fit it)" if facts["reserve_left"] < 0 else ""
    rows["reserve left"] = f"{facts['reserve_left']:,.0f} dollars{short}"
    rows["compute left"] = f"{facts['compute_left']:,.0f} dollars"
    return rows


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:.0f} bytes"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
