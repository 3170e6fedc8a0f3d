"""Questions with options: the model chooses the option it finds most probable after the question."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gristmill.core import LanguageModel, Message, Prompt, Renderer, Score, TaskResult
from gristmill.errors import DataError
from gristmill.evaluate.metrics import accuracy, wilson_interval
from gristmill.evaluate.provenance import content_hash

Normalise = Literal["none", "token", "byte"]


@dataclass(frozen=True)
class Question:
    """Options and the index of the right one, after either a conversation or a plain prompt.

    Options are scored exactly as written: after a plain prompt they begin with their own space.
    """

    options: Sequence[str]
    gold: int
    prompt: Prompt | None = None
    messages: Sequence[Message] | None = None


@dataclass
class MultipleChoice:
    """A Task: accuracy over questions, with its standard error and one record per question.

    A record holds sample, prompt, options, scores, choice, gold and correct. Options that tie for the best score
    share the credit, so that a model that tells nothing apart stands at chance whatever the order of the options.
    Raises DataError naming the question that is malformed.
    """

    name: str
    questions: Sequence[Question]
    renderer: Renderer | None = None
    """Turns the questions' messages into prompts."""
    normalise: Normalise = "none"
    """Compare sums of log-probabilities, or their means per token or per UTF-8 byte of the option."""
    end: str = ""
    """Put after every option, such as the end of a turn: with it, an option that begins another has no advantage."""

    def __post_init__(self) -> None:
        if len(self.questions) < 2:
            raise DataError(f"{self.name}: needs at least two questions, got {len(self.questions)}")
        for index, question in enumerate(self.questions):
            if fault := self._fault(question):
                raise DataError(f"{self.name}: question {index} {fault}")

    def evaluate(self, model: LanguageModel) -> TaskResult:
        """Score all options of all questions in one call."""
        prompts = [self._prompt(question) for question in self.questions]
        pairs = [(p, o + self.end) for p, q in zip(prompts, self.questions, strict=True) for o in q.options]
        scores = iter(model.score_many(pairs))
        records = []
        for index, question in enumerate(self.questions):
            own = [self._value(next(scores), option) for option in question.options]
            if not all(map(math.isfinite, own)):
                raise DataError(f"{self.name}: question {index} has scores that are not finite: {own}")
            records.append(_record(index, question, own))
        estimate = accuracy([record["correct"] for record in records])
        return TaskResult(self.name, estimate.value, estimate.standard_error, estimate.samples, records)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that stand for all that is scored, the chat template included, and how."""
        asked = [[self._prompt(question), list(question.options), question.gold] for question in self.questions]
        return content_hash([asked, self.normalise, self.end])[:12]

    def _fault(self, question: Question) -> str:
        if (question.prompt is None) == (question.messages is None):
            return "needs either prompt or messages, and not both"
        if question.messages is not None and self.renderer is None:
            return "has messages; give the task a renderer"
        if len(question.options) < 2 or len(set(question.options)) < len(question.options):
            return "needs at least two options, all different"
        if not all(question.options):
            return "has an empty option"
        if not 0 <= question.gold < len(question.options):
            return f"has gold {question.gold}, but {len(question.options)} options"
        return ""

    def _prompt(self, question: Question) -> Prompt:
        if question.prompt is not None:
            return question.prompt
        assert self.renderer is not None  # __post_init__ saw to both
        assert question.messages is not None
        return self.renderer.render_prompt(question.messages)

    def _value(self, score: Score, option: str) -> float:
        if self.normalise == "token":
            return score.logprob / len(score.token_ids)
        if self.normalise == "byte":
            return score.logprob / len((option + self.end).encode("utf-8"))
        return score.logprob


def _record(index: int, question: Question, scores: list[float]) -> dict[str, Any]:
    best = [place for place, score in enumerate(scores) if score == max(scores)]
    asked = question.prompt if question.messages is None else [dict(message) for message in question.messages]
    return {
        "sample": index,
        "prompt": asked if isinstance(asked, str) else list(asked or ()),
        "options": list(question.options),
        "scores": scores,
        "choice": best[0],
        "gold": question.gold,
        "correct": (question.gold in best) / len(best),
    }


@dataclass(frozen=True)
class ClassAccuracy:
    """How often one answer was found where it is the right one, with the bounds of its Wilson interval (95 %)."""

    label: str
    correct: int
    samples: int
    low: float
    high: float


@dataclass(frozen=True)
class ChoiceSummary:
    """What a MultipleChoice result must be read against.

    `confusion[i][j]` counts the questions whose right answer is `labels[i]` and whose choice was `labels[j]`.
    """

    chance: float
    """Expected accuracy of guessing."""
    majority: float
    """Accuracy of always giving the most frequent right answer."""
    labels: list[str]
    classes: list[ClassAccuracy]
    confusion: list[list[int]]


def summarise(result: TaskResult) -> ChoiceSummary:
    """Baselines, per-class accuracy and confusion matrix from the records of a MultipleChoice result."""
    records = result.records
    gold = Counter(record["options"][record["gold"]] for record in records)
    labels = sorted({option for record in records for option in record["options"]})
    place = {label: index for index, label in enumerate(labels)}
    confusion = [[0] * len(labels) for _ in labels]
    for record in records:
        confusion[place[record["options"][record["gold"]]]][place[record["options"][record["choice"]]]] += 1
    classes = []
    for label, row in zip(labels, confusion, strict=True):
        if gold[label]:
            right = row[place[label]]
            classes.append(ClassAccuracy(label, right, gold[label], *wilson_interval(right, gold[label])))
    chance = sum(1 / len(record["options"]) for record in records) / len(records)
    return ChoiceSummary(chance, max(gold.values()) / len(records), labels, classes, confusion)
