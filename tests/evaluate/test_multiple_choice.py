"""Choices follow the model's log-probabilities, and results carry what they must be read against."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest

from gristmill.core import Message, Prompt, Rendered, Renderer, Score
from gristmill.errors import DataError
from gristmill.evaluate.multiple_choice import MultipleChoice, Question, summarise
from gristmill.files import write_json
from gristmill.scripted import ByteCodec, ScriptedLM

TOPICS = ["art", "science", "sport"]


class Preferring(ScriptedLM):
    """Gives each completion the log-probability a function tells, spread over its bytes."""

    def __init__(self, logprob: Callable[[str, str], float]) -> None:
        super().__init__([])
        self._logprob_of = logprob

    def score(self, prompt: Prompt, completion: Prompt) -> Score:
        text = prompt if isinstance(prompt, str) else ByteCodec().decode(prompt)
        assert isinstance(completion, str)
        ids = list(completion.encode())
        return Score(ids, [self._logprob_of(text, completion) / len(ids)] * len(ids), is_greedy=False)


class Lines(Renderer):
    """`role: content` lines as bytes."""

    def __init__(self, separator: str = "\n") -> None:
        self.separator = separator

    def render(self, messages: Sequence[Message]) -> Rendered:
        raise NotImplementedError

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return list(self.separator.join([*lines, "assistant:"]).encode())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return ()


def topic_questions() -> list[Question]:
    asked = [("paint", 0), ("atoms", 1), ("music", 0), ("goals", 2), ("genes", 1), ("rhyme", 0)]
    return [Question(options=TOPICS, gold=gold, prompt=f"Topic of {word}:") for word, gold in asked]


def knows(prompt: str, option: str) -> float:
    right = {"paint": "art", "atoms": "science", "music": "sport", "goals": "sport", "genes": "science"}
    return -1.0 if right.get(prompt.split()[2].rstrip(":"), "science") == option else -5.0


def test_accuracy_error_and_records() -> None:
    task = MultipleChoice("topics", topic_questions())
    result = task.evaluate(Preferring(knows))
    assert result.value == pytest.approx(4 / 6)
    assert result.standard_error == pytest.approx((4 / 6 * 2 / 6 / 5) ** 0.5)
    assert result.samples == 6
    wrong = result.records[2]
    assert (wrong["prompt"], wrong["choice"], wrong["gold"], wrong["correct"]) == ("Topic of music:", 2, 0, 0.0)
    assert wrong["scores"] == pytest.approx([-5.0, -5.0, -1.0])
    assert task.evaluate(Preferring(knows)) == result


def test_records_can_be_written_as_json(tmp_path: object) -> None:
    result = MultipleChoice("topics", topic_questions()).evaluate(Preferring(knows))
    write_json(tmp_path / "samples.json", result.records)  # type: ignore[operator]


def test_summary_has_chance_majority_classes_and_confusion() -> None:
    summary = summarise(MultipleChoice("topics", topic_questions()).evaluate(Preferring(knows)))
    assert summary.chance == pytest.approx(1 / 3)
    assert summary.majority == pytest.approx(3 / 6)
    assert summary.labels == TOPICS
    assert summary.confusion == [[1, 1, 1], [0, 2, 0], [0, 0, 1]]
    assert [(c.label, c.correct, c.samples) for c in summary.classes] == [
        ("art", 1, 3),
        ("science", 2, 2),
        ("sport", 1, 1),
    ]
    assert all(c.low <= c.correct / c.samples <= c.high for c in summary.classes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_model_that_tells_nothing_apart_stands_at_chance_in_any_order(order: tuple[int, ...]) -> None:
    questions = [
        Question([q.options[i] for i in order], order.index(q.gold), prompt=q.prompt) for q in topic_questions()
    ]
    assert MultipleChoice("topics", questions).evaluate(Preferring(lambda *_: -2.0)).value == pytest.approx(1 / 3)


def test_normalisation_changes_who_wins() -> None:
    def per_byte(prompt: str, option: str) -> float:
        return -len(option) * (0.5 if option == "a long answer" else 1.0)

    question = Question(["short", "a long answer"], 1, prompt="p")
    for normalise, expected in [("none", 0.0), ("token", 1.0), ("byte", 1.0)]:
        task = MultipleChoice("length", [question] * 2, normalise=normalise)  # type: ignore[arg-type]
        result = task.evaluate(Preferring(per_byte))
        assert result.value == expected
    assert result.records[0]["scores"] == pytest.approx([-1.0, -0.5])


def test_token_and_byte_normalisation_differ_where_a_token_has_many_bytes() -> None:
    class OneToken(Preferring):
        def score(self, prompt: Prompt, completion: Prompt) -> Score:
            return Score([0], [-float(len(completion))], is_greedy=False)

    questions = [Question(["ab", "abcd"], 0, prompt="p")] * 2
    token = MultipleChoice("x", questions, normalise="token").evaluate(OneToken(knows))
    byte = MultipleChoice("x", questions, normalise="byte").evaluate(OneToken(knows))
    assert token.records[0]["scores"] == [-2.0, -4.0]
    assert byte.records[0]["scores"] == [-1.0, -1.0]


def test_an_end_takes_the_advantage_from_an_option_that_begins_another() -> None:
    model = ScriptedLM([])
    questions = [Question(["art", "artist"], 1, prompt="p")] * 2
    bare = MultipleChoice("x", questions).evaluate(model).records[0]["scores"]
    ended = MultipleChoice("x", questions, end="\n").evaluate(model).records[0]["scores"]
    assert bare[0] > bare[1]
    assert ended == pytest.approx([model.score("p", "art\n").logprob, model.score("p", "artist\n").logprob])


def test_messages_go_through_the_renderer() -> None:
    messages: list[Message] = [{"role": "user", "content": "Topic?"}]
    questions = [Question(TOPICS, 0, messages=messages)] * 2
    seen = []

    def spy(prompt: str, option: str) -> float:
        seen.append(prompt)
        return -1.0 if option == "art" else -2.0

    result = MultipleChoice("chat", questions, Lines()).evaluate(Preferring(spy))
    assert set(seen) == {"user: Topic?\nassistant:"}
    assert result.records[0]["prompt"] == messages


def test_the_fingerprint_covers_template_options_and_normalisation() -> None:
    messages: list[Message] = [{"role": "user", "content": "Topic?"}]
    task = MultipleChoice("chat", [Question(TOPICS, 0, messages=messages)] * 2, Lines())
    assert task.fingerprint == dataclasses.replace(task, renderer=Lines()).fingerprint
    others = [
        dataclasses.replace(task, renderer=Lines(separator="\n\n")),
        dataclasses.replace(task, normalise="byte"),
        dataclasses.replace(task, end="\n"),
        dataclasses.replace(task, questions=[Question(TOPICS, 1, messages=messages)] * 2),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(TOPICS, 0), "either prompt or messages"),
        (Question(TOPICS, 0, prompt="p", messages=[{"role": "user", "content": "q"}]), "not both"),
        (Question(TOPICS, 0, messages=[{"role": "user", "content": "q"}]), "renderer"),
        (Question(["a"], 0, prompt="p"), "two options"),
        (Question(["a", "a"], 0, prompt="p"), "different"),
        (Question(["a", ""], 0, prompt="p"), "empty option"),
        (Question(TOPICS, 3, prompt="p"), "gold 3"),
    ],
)
def test_a_malformed_question_is_named(question: Question, message: str) -> None:
    with pytest.raises(DataError, match=f"question 1 .*{message}"):
        MultipleChoice("topics", [topic_questions()[0], question])


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="question 0"):
        MultipleChoice("topics", topic_questions()).evaluate(Preferring(lambda *_: float("-inf")))
