"""What the quickstart measures: held-out bits per byte, topic questions, samples, and the export."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gristmill.align.encyclopedia import (
    Article,
    about_question,
    description_question,
    topic_question,
    topics,
)
from gristmill.core import LanguageModel, Message, Renderer, SamplingParams, TaskResult
from gristmill.engine.llm import LLM
from gristmill.errors import DataError, GristmillError, MissingExtra
from gristmill.evaluate.compare import Comparison, compare_accuracy, compare_to_level
from gristmill.evaluate.language_modelling import HeldOutPerplexity, token_perplexity
from gristmill.evaluate.multiple_choice import MultipleChoice, Question, summarise
from gristmill.evaluate.run_report import Confusion, Result, Sample
from gristmill.model.formats.verify import logits_difference
from gristmill.model.load import load_model
from gristmill.quickstart.config import BUDGETS, ROW_LENGTH
from gristmill.quickstart.run import StageRecord
from gristmill.quickstart.stages import Quickstart, spread
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.templates import IM_END

TOLERANCE = 1e-3
"""Greatest difference of logits between the export and transformers, float32."""
SAMPLE_TOKENS = 48
"""Length of the answers shown in the report."""


def check_export(run: Quickstart, record: StageRecord) -> None:
    """Load the export with transformers and compare logits. Raises GristmillError when they differ."""
    model, tokenizer = load_model(run.export_directory)
    ids = tokenizer.encode(run.documents[1][0].text)[:ROW_LENGTH]
    try:
        difference = logits_difference(model, run.export_directory, ids)
    except MissingExtra as error:
        record.facts = {"checked": "", "note": f"not checked: {error}"}
        return
    if not difference <= TOLERANCE:  # NaN too
        raise GristmillError(f"{run.export_directory}: logits differ from transformers' by {difference:.2e}")
    record.facts = {"checked": "transformers", "max_logit_difference": difference, "tokens": len(ids)}


def evaluate(run: Quickstart, record: StageRecord) -> None:
    """Base and fine-tuned model on held-out text and questions; all figures go into the record's facts."""
    base, tuned = LLM(run.base_directory), LLM(run.export_directory)
    results = _perplexity(run, base, "base") + _perplexity(run, tuned, "fine-tuned")
    questions, left_out = _topic_articles(run)
    labels = topics(questions)
    asked, plain = _topic_task(questions, labels, tuned.renderer), _plain_task(questions, labels)
    asked_tuned, asked_base, plain_base = asked.evaluate(tuned), asked.evaluate(base), plain.evaluate(base)
    # the base model gets the benefit of the form that suits it better
    best_base = max(asked_base, plain_base, key=lambda result: result.value)
    summary = summarise(asked_tuned)
    for system, result, task, note in (
        ("fine-tuned", asked_tuned, asked, "asked as a chat question"),
        ("base", asked_base, asked, "asked as a chat question"),
        ("base, plain text", plain_base, plain, "asked to complete 'Topic:'"),
    ):
        results.append(
            Result(
                "Topic questions",
                result.value,
                result.standard_error,
                result.samples,
                note=f"{note}; {left_out} too long to ask" if left_out else note,
                system=system,
                unit="%",
                chance=summary.chance,
                majority=summary.majority,
                task=task.fingerprint,
                headline=system == "fine-tuned",
            )
        )
    comparisons = [
        compare_to_level("Topic questions", asked_tuned, summary.chance, names=("fine-tuned", "chance")),
        _against_base(asked_tuned, best_base),
        compare_to_level(
            "Topic questions", asked_tuned, summary.majority, names=("fine-tuned", "always the most frequent topic")
        ),
    ]
    record.facts = {
        "results": [asdict(result) for result in results],
        "verdicts": [comparison.verdict for comparison in comparisons],
        "better": [comparison.better for comparison in comparisons],
        "confusion": asdict(Confusion(summary.labels, summary.confusion, "fine-tuned")),
        "samples": [asdict(sample) for sample in _samples(questions, base, tuned)],
    }


def _perplexity(run: Quickstart, model: LanguageModel, system: str) -> list[Result]:
    tokenizer = run.tokenizer
    assert tokenizer.eos_token_id is not None  # train_bpe sets it
    task = HeldOutPerplexity(
        "Held-out text",
        [document.text for document in run.documents[1]],
        [tokenizer.eos_token_id],
        encode=tokenizer.encode,
        window=ROW_LENGTH,
    )
    bits = task.evaluate(model)
    perplexity = token_perplexity(bits)
    return [
        _figure(bits, "Bits per byte", system, task.fingerprint, headline=system == "base"),
        _figure(perplexity, "Perplexity per token", system, task.fingerprint),
    ]


def _figure(result: TaskResult, name: str, system: str, task: str, *, headline: bool = False) -> Result:
    return Result(
        name, result.value, result.standard_error, result.samples, system=system, task=task, headline=headline
    )


def _topic_articles(run: Quickstart) -> tuple[list[Article], int]:
    """Held-out articles to ask about, and how many are not asked because they do not fit the context."""
    known = [article for article in run.held_out_articles() if article.has_topic]
    encode, renderer = run.tokenizer.encode, JinjaRenderer(run.tokenizer)
    longest = max(len(encode(f" {label}{IM_END}")) for label in topics(known))
    room = ROW_LENGTH - max(longest, SAMPLE_TOKENS)
    fitting = [
        article
        for article in known
        if len(renderer.render_prompt(topic_question(article))) <= room and len(encode(_plain_prompt(article))) <= room
    ]
    chosen = spread(fitting, BUDGETS[run.config.preset].questions)
    if len(topics(chosen)) < 2:
        raise DataError("fewer than two topics are among the held-out articles that fit: there is nothing to ask")
    return chosen, len(known) - len(fitting)


def _topic_task(items: list[Article], labels: list[str], renderer: Renderer) -> MultipleChoice:
    questions = [Question(labels, labels.index(item.topic), messages=topic_question(item)) for item in items]
    return MultipleChoice("Topic questions", questions, renderer=renderer, end=IM_END)


def _plain_task(items: list[Article], labels: list[str]) -> MultipleChoice:
    options = [f" {label}" for label in labels]
    questions = [Question(options, labels.index(item.topic), prompt=_plain_prompt(item)) for item in items]
    return MultipleChoice("Topic questions", questions, normalise="byte")


def _plain_prompt(item: Article) -> str:
    return f"{item.title}\n\n{item.sentence}\n\nTopic:"


def _against_base(tuned: TaskResult, base: TaskResult) -> Comparison:
    """Paired by question; the prompts differ in form, so only the order and the right answers must agree."""
    aligned = [
        {**own, "prompt": other["prompt"], "options": other["options"]}
        for own, other in zip(tuned.records, base.records, strict=True)
    ]
    same = TaskResult(tuned.name, tuned.value, tuned.standard_error, tuned.samples, aligned)
    return compare_accuracy("Topic questions", same, base, names=("fine-tuned", "base"))


def _samples(items: list[Article], base: LLM, tuned: LLM) -> list[Sample]:
    chosen = [items[0], items[len(items) // 2]]
    asked: list[tuple[list[Message], str]] = [
        *((topic_question(item), item.topic) for item in chosen),
        *((about_question(item), item.sentence) for item in chosen),
        *((description_question(item), item.description) for item in chosen),
    ]
    params = SamplingParams(temperature=0.0, max_tokens=SAMPLE_TOKENS, repetition_penalty=1.2)
    prompts = [tuned.renderer.render_prompt(messages) for messages, _ in asked]
    answers: dict[str, Any] = {"base": base.generate(prompts, params), "fine-tuned": tuned.generate(prompts, params)}
    return [
        Sample(
            prompt=messages[0]["content"],
            answers={system: outputs[number].outputs[0].text.strip() for system, outputs in answers.items()},
            reference=reference,
        )
        for number, (messages, reference) in enumerate(asked)
    ]
