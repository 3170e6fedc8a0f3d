"""A small encyclopedia that code makes, in the layout of the Wikipedia summaries, and a preset that is done at once."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gristmill.model import presets
from gristmill.quickstart import config, pipeline, run

Articles = dict[str, dict[str, str]]

WORDS = {
    "Astronomy": "star comet orbit galaxy eclipse telescope nebula planet meteor lunar",
    "Cooking": "oven butter recipe flour sauce garlic kettle spoon pastry simmer",
    "Sailing": "mast harbour rudder anchor canvas deck voyage tide keel lantern",
}
COMMON = "old small famous quiet northern early simple modern common wooden large bright"
BUDGET = config.Budget(3.0, 4e-3, 2.0, 2e-3, 4, None, 40)
SHAPE = (2, 32, 2, 1, 400)


def toy_articles(count: int = 150, topics: int = 3) -> Articles:
    """Articles by title, sorted by topic as the real file is; the same at every call. Most words tell the topic."""
    draw = random.Random(1)
    articles: Articles = {}
    for number, topic in enumerate(sorted((list(WORDS)[:topics] * count)[:count])):
        words = [*WORDS[topic].split() * 2, *COMMON.split()]
        title, *phrases = (" ".join(draw.choices(words, k=length)) for length in (3, 8, 10, 9, 3))
        title = f"{title.title()} {number}"
        articles[title] = {
            "title": title,
            "extract": f"{title} is a {phrases[0]}. It has a {phrases[1]}. Its {phrases[2]}.",
            "description": phrases[3],
            "topic": topic,
        }
    return articles


def write_corpus(path: Path, articles: Articles | None = None) -> Path:
    """The articles as a JSON file; the toy ones when none are given."""
    path.write_text(json.dumps(toy_articles() if articles is None else articles), encoding="utf-8")
    return path


def shrink(set_item: Callable[[Any, str, Any], None] = dict.__setitem__) -> None:
    """Make the nano preset a matter of seconds."""
    set_item(config.BUDGETS, "nano", BUDGET)
    set_item(presets._SHAPES, "nano", SHAPE)


def arguments(directory: Path, corpus: Path, *more: str) -> list[str]:
    """The command line of a toy run."""
    options = {"--preset": "nano", "--out": directory, "--corpus": corpus, "--precision": "float32"}
    return ["quickstart", *(str(word) for pair in options.items() for word in pair), *more]


def toy_main(words: list[str], die_in: str = "") -> int:
    """The command in a process of its own, which is killed just before the record of stage `die_in` is written."""
    from gristmill.cli import main

    shrink()
    if die_in:
        original = run.write_json

        def dying(path: Path, value: Any) -> None:
            if path.stem == die_in:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, value)

        run.write_json = dying
    return main(words)


STAGES = tuple(pipeline._STAGES)
