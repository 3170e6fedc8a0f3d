"""Questions and answers that code makes from encyclopedia articles: no model and no annotator is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gristmill.core import Message
from gristmill.corpus.document import Document
from gristmill.corpus.sentences import first_sentence
from gristmill.corpus.sources import summary_body

UNKNOWN_TOPIC = "Uncategorized"


@dataclass(frozen=True)
class Article:
    """What the questions are made from."""

    title: str
    description: str
    topic: str
    sentence: str
    """The first sentence of the text."""

    @property
    def has_topic(self) -> bool:
        """Whether the topic is told."""
        return self.topic not in ("", UNKNOWN_TOPIC)


def articles(documents: Iterable[Document]) -> Iterator[Article]:
    """Articles of documents from `read_wikipedia_summaries`."""
    for document in documents:
        facts = document.metadata
        yield Article(facts["title"], facts["description"], facts["topic"], first_sentence(summary_body(document)))


def topics(items: Iterable[Article]) -> list[str]:
    """The topics that occur, sorted; the unknown one is none."""
    return sorted({item.topic for item in items if item.has_topic})


def topic_question(article: Article) -> list[Message]:
    """A question whose answer is the article's topic. The title is not told apart from the sentence."""
    return [{"role": "user", "content": f"Which topic does this text belong to?\n{article.sentence}"}]


def about_question(article: Article) -> list[Message]:
    """A question whose answer is the article's first sentence."""
    return [{"role": "user", "content": f"Tell me about {article.title}."}]


def description_question(article: Article) -> list[Message]:
    """A question whose answer is the article's short description."""
    return [{"role": "user", "content": f"Describe {article.title} in a few words."}]


def conversations(article: Article) -> Iterator[list[Message]]:
    """All question-answer pairs of an article that have an answer."""
    if article.has_topic:
        yield _answered(topic_question(article), article.topic)
    yield _answered(about_question(article), article.sentence)
    if article.description.strip():
        yield _answered(description_question(article), article.description.strip())


def _answered(question: list[Message], answer: str) -> list[Message]:
    return [*question, {"role": "assistant", "content": answer}]
