"""Questions made from articles."""

from __future__ import annotations

from gristmill.align.encyclopedia import (
    UNKNOWN_TOPIC,
    Article,
    about_question,
    articles,
    conversations,
    description_question,
    topic_question,
    topics,
)
from gristmill.corpus.document import Document

MARS = Article("Mars", "fourth planet", "Astronomy", "Mars is the fourth planet.")


def document(title: str, extract: str, topic: str = "Astronomy", description: str = "a planet") -> Document:
    return Document(title, f"{title}\n\n{extract}", {"title": title, "topic": topic, "description": description})


def answers(article: Article) -> dict[str, str]:
    pairs = list(conversations(article))
    assert all([message["role"] for message in pair] == ["user", "assistant"] for pair in pairs)
    return {pair[0]["content"]: pair[1]["content"] for pair in pairs}


def test_an_article_is_the_facts_and_the_first_sentence_without_the_title() -> None:
    found = list(
        articles([document("Mars", "Mars is a planet, e.g. of dust. It is red.", description="fourth planet")])
    )
    assert found == [Article("Mars", "fourth planet", "Astronomy", "Mars is a planet, e.g. of dust.")]


def test_three_questions_whose_answers_are_the_facts() -> None:
    assert answers(MARS) == {
        topic_question(MARS)[0]["content"]: "Astronomy",
        about_question(MARS)[0]["content"]: "Mars is the fourth planet.",
        description_question(MARS)[0]["content"]: "fourth planet",
    }
    assert [pair[0] for pair in conversations(MARS)] == [
        topic_question(MARS)[0],
        about_question(MARS)[0],
        description_question(MARS)[0],
    ], "what is asked in the evaluation is what was trained, word for word"


def test_the_topic_question_does_not_hold_its_answer() -> None:
    (question,) = topic_question(MARS)
    assert MARS.sentence in question["content"]
    assert "Astronomy" not in question["content"]
    assert MARS.description not in question["content"].replace(MARS.sentence, "")


def test_what_is_not_told_is_not_asked() -> None:
    for topic in (UNKNOWN_TOPIC, ""):
        unknown = Article("Mars", " ", topic, "Mars is a planet.")
        assert answers(unknown) == {about_question(MARS)[0]["content"]: "Mars is a planet."}
        assert not unknown.has_topic


def test_topics_are_sorted_and_the_unknown_one_is_none() -> None:
    named = [Article("a", "", topic, "") for topic in ("Sailing", UNKNOWN_TOPIC, "Cooking", "Sailing", "")]
    assert topics(named) == ["Cooking", "Sailing"]
