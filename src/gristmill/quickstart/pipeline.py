"""All stages in order, and the report made from what they left."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from gristmill import assets
from gristmill.corpus.funnel import Funnel
from gristmill.errors import DataError
from gristmill.evaluate.provenance import provenance
from gristmill.evaluate.report import write_report
from gristmill.evaluate.run_report import Confusion, Curve, FunnelRow, Result, RunReport, Sample, Series, Stage
from gristmill.files import exclusive
from gristmill.quickstart import evaluation, stages
from gristmill.quickstart.config import BUDGETS, HELD_OUT_SHARE, ROW_LENGTH, QuickstartConfig, choose_precision
from gristmill.quickstart.run import StageRecord, claim, stage
from gristmill.quickstart.stages import Quickstart
from gristmill.train.metrics import read_metrics


def _evaluate(run: Quickstart, record: StageRecord) -> None:
    """The figures, and beside them where they come from: a report made again later must not claim later code."""
    evaluation.evaluate(run, record)
    chosen = settings(run.config)
    record.facts["provenance"] = {**provenance(chosen, run.config.seed), "corpus": chosen["corpus"]}


_STAGES = {
    "corpus": stages.clean_corpus,
    "tokenizer": stages.train_tokenizer,
    "tokens": stages.tokenise,
    "pretrain": stages.pretrain,
    "questions": stages.make_questions,
    "finetune": stages.finetune,
    "export": evaluation.check_export,
    "evaluation": _evaluate,
}


def quickstart(config: QuickstartConfig) -> RunReport:
    """Run what is not done yet and write report.md and report.html into the run directory."""
    run = Quickstart(config)
    chosen = settings(config)  # reads the corpus: one that is not there leaves no run directory
    with exclusive(run.directory):
        claim(run.directory, chosen)
        records = {
            name: stage(run.directory, name, lambda record, work=work: work(run, record))  # type: ignore[misc]
            for name, work in _STAGES.items()
        }
        report = make_report(run, records)
        write_report(report, run.directory)
    return report


def settings(config: QuickstartConfig) -> dict[str, Any]:
    """All that shapes the result. A run directory serves one set of them. Raises DataError without the corpus."""
    budget = BUDGETS[config.preset]
    return {
        "preset": config.preset,
        "corpus": _corpus_identity(config.corpus),
        "seed": config.seed,
        "device": config.device,
        "precision": choose_precision(config),
        "row_length": ROW_LENGTH,
        "held_out_share": HELD_OUT_SHARE,
        **{name: getattr(budget, name) for name in budget.__dataclass_fields__},
    }


def _corpus_identity(corpus: str) -> str:
    """Another text in the same file is another corpus; the same file elsewhere is not."""
    if not corpus:
        asset = assets.find("wikipedia-summaries")
        return f"{asset.name} {asset.version}, {asset.licence}, SHA-256 {asset.sha256}"
    try:
        with Path(corpus).open("rb") as handle:
            return f"{Path(corpus).name}, SHA-256 {hashlib.file_digest(handle, 'sha256').hexdigest()}"
    except OSError as error:
        raise DataError(f"{corpus}: the corpus cannot be read ({error.strerror})") from error


def make_report(run: Quickstart, records: dict[str, StageRecord]) -> RunReport:
    """The report of a finished run."""
    facts = records["evaluation"].facts
    parameters, corpus = records["pretrain"].facts["parameters"], records["corpus"].facts
    return RunReport(
        name=f"Quickstart {run.config.preset}",
        summary=(
            f"A decoder of {parameters / 1e6:.1f} million parameters, pretrained from random weights on "
            f"{corpus['training']:,} short articles and fine-tuned on questions made from them; "
            f"{corpus['held_out']:,} other articles are held out."
        ),
        stages=[
            Stage(record.name, record.seconds, record.tokens, record.flops, record.peak_memory_bytes)
            for record in records.values()
        ],
        curves=[_curve(run.directory, "pretrain", "Pretraining"), _curve(run.directory, "finetune", "Fine-tuning")],
        funnel=_funnel(run.directory),
        results=[Result(**result) for result in facts["results"]],
        verdicts=facts["verdicts"],
        confusion=Confusion(**facts["confusion"]),
        samples=[Sample(**sample) for sample in facts["samples"]],
        provenance=_provenance(records),
        commands=commands(run),
    )


def commands(run: Quickstart) -> list[tuple[str, str]]:
    """What one can do with the finished run."""
    program, home, base = shlex.quote(_program()), shlex.quote(str(run.directory)), shlex.quote(str(run.base_directory))
    return [
        ("chat with it", f"{program} chat {home}"),
        ("serve it over HTTP, with a page", f"{program} serve {home}"),
        ("complete a text with the base model", f'{program} generate {base} --prompt "The river"'),
    ]


def _program() -> str:
    """How this shell calls us: by name, or by path where the virtual environment is not activated."""
    if shutil.which("gristmill"):
        return "gristmill"
    return os.path.relpath(Path(sys.executable).parent / "gristmill")


def _curve(directory: Path, name: str, title: str) -> Curve:
    records = read_metrics(directory / name / "metrics.jsonl")
    measured = [record for record in records if "validation_loss" in record]
    tokens = [record["tokens"] for record in records]
    return Curve(
        title=title,
        series=[
            Series("training", tokens, [record["loss"] for record in records]),
            Series(
                "held out",
                [record["tokens"] for record in measured],
                [record["validation_loss"] for record in measured],
            ),
        ],
        learning_rate=Series("learning rate", tokens, [record["learning_rate"] for record in records]),
        hint="Both lines fall and stay close; a held-out line that turns up while the other falls is over-fitting.",
    )


def _funnel(directory: Path) -> list[FunnelRow]:
    funnel = Funnel.load(directory / "corpus")
    rows = [FunnelRow("read", funnel.documents_in, note=f"{funnel.steps[0].characters_in:,} characters")]
    return rows + [
        FunnelRow(step.name, step.kept, note=f"{step.characters_out:,} characters left") for step in funnel.steps
    ]


def _provenance(records: dict[str, StageRecord]) -> dict[str, str]:
    facts: dict[str, str] = dict(records["evaluation"].facts["provenance"])
    export = records["export"].facts
    if export["checked"]:
        facts["export"] = (
            f"logits equal transformers' within {export['max_logit_difference']:.1e} on {export['tokens']} tokens"
        )
    else:
        facts["export"] = export["note"]
    facts["precision"] = records["pretrain"].facts["precision"]
    return facts
