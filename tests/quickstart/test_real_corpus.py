"""What the presets take of the real corpus."""

from __future__ import annotations

from collections import Counter

import pytest

from gristmill.align.encyclopedia import articles, topics
from gristmill.corpus.sources import read_wikipedia_summaries
from gristmill.corpus.split import split
from gristmill.quickstart.config import BUDGETS, HELD_OUT_SHARE
from gristmill.quickstart.stages import spread


@pytest.mark.asset
@pytest.mark.parametrize("preset", BUDGETS)
def test_every_topic_is_trained_on_and_asked_about_in_its_share(preset: str) -> None:
    from gristmill import assets

    budget = BUDGETS[preset]  # type: ignore[index]
    everything = list(read_wikipedia_summaries(assets.get("wikipedia-summaries")))
    training, held_out = split(spread(everything, budget.documents), HELD_OUT_SHARE)
    known = [article for article in articles(held_out) if article.has_topic]
    asked = spread(known, budget.questions)
    assert topics(asked) == topics(articles(training)) == topics(articles(everything))
    assert len(asked) == min(budget.questions, len(known))
    shares, asked_shares = (Counter(article.topic for article in items) for items in (known, asked))
    for topic, count in shares.items():
        assert asked_shares[topic] == pytest.approx(count * len(asked) / len(known), abs=1.5)
