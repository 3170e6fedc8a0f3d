"""The example that trains BERT with and without next sentence prediction: the same budget, and nothing of the pair."""

from __future__ import annotations

from programs import program


def test_both_read_the_same_tokens_and_one_has_nothing_for_the_pair() -> None:
    found = program("next_sentence").compare(seeds=(0,), steps=4)
    (with_pair,), (without,) = found["with"], found["without"]
    assert with_pair.tokens == without.tokens
    assert without.pair is None
    assert with_pair.pair is not None
    size = 64
    assert with_pair.weights - without.weights == size * size + size + 2 * size + 2, "pooler and decision"
    assert 0 < without.masked < 6
    assert 0 < with_pair.masked < 6
