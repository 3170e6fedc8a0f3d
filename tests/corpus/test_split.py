from hypothesis import given
from hypothesis import strategies as st

from gristmill.corpus.document import Document
from gristmill.corpus.split import is_held_out, split

DOCUMENTS = [Document(f"doc-{number}", "text") for number in range(20_000)]


def test_the_share_is_met_within_chance():
    _, held_out = split(DOCUMENTS, 0.05)
    # Standard deviation of a binomial of 20,000 at 0.05 is 31.
    assert abs(len(held_out) - 1000) < 4 * 31


def test_a_document_stays_whatever_else_changes():
    training, held_out = split(DOCUMENTS, 0.05)
    fewer_training, fewer_held_out = split(reversed(DOCUMENTS[::3]), 0.05)
    assert {d.id for d in fewer_held_out} <= {d.id for d in held_out}
    assert {d.id for d in fewer_training} <= {d.id for d in training}


def test_the_split_is_the_same_on_every_machine():
    assert [d.id for d in DOCUMENTS[:200] if is_held_out(d.id, 0.02)] == ["doc-89", "doc-128", "doc-152"]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds(name, one, other):
    small, large = sorted((one, other))
    assert is_held_out(name, large) or not is_held_out(name, small)
    assert is_held_out(name, 1.0)
    assert not is_held_out(name, 0.0)


def test_salts_draw_independent_splits():
    both = sum(is_held_out(d.id, 0.5, "a") and is_held_out(d.id, 0.5, "b") for d in DOCUMENTS)
    assert abs(both - 5000) < 4 * 61
