import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.corpus.clean import Clean
from gristmill.corpus.dedup import ExactDuplicates
from gristmill.corpus.document import Document
from gristmill.corpus.filters import too_short
from gristmill.corpus.funnel import DOCUMENTS, EXCERPT, FUNNEL, REJECTS, SAMPLES, Funnel, default_steps, run_pipeline
from gristmill.corpus.sources import read_documents
from gristmill.errors import DataError

pytest.importorskip("rensa")


def messy_corpus(seed=0, size=120):
    """Prose, near and exact copies, fragments, tables and spam, in a shuffled order."""
    generator = random.Random(seed)
    vocabulary = ["".join(generator.choices("aeioubdgklmnrst", k=5)) for _ in range(2000)]
    texts = []
    for number in range(size):
        body = generator.choices(vocabulary, k=80)
        texts.append(" ".join(body) + ".")
        if number % 4 == 0:
            texts.append(" ".join([*body[:-1], "changed"]))
        if number % 5 == 0:
            texts.append(texts[-1].upper())
        if number % 6 == 0:
            texts.extend(["frag\u00a0ment", "1 | 2 | 3 | 4 | " * 9, "Buy this now and save much more today. " * 9])
    generator.shuffle(texts)
    return [Document(f"d{number}", text, {"n": str(number)}) for number, text in enumerate(texts)]


def test_counts_add_up_and_every_reject_is_written(tmp_path):
    documents = messy_corpus()
    funnel = run_pipeline(documents, default_steps(), tmp_path)
    assert funnel.documents_in == len(documents)
    for step, following in zip(funnel.steps, funnel.steps[1:], strict=False):
        assert (step.kept, step.characters_out) == (following.documents_in, following.characters_in)
    rejects = [json.loads(line) for line in (tmp_path / REJECTS).read_text("utf-8").splitlines()]
    for step in funnel.steps:
        assert step.documents_in == step.kept + step.dropped
        mine = [reject for reject in rejects if reject["step"] == step.name]
        assert len(mine) == step.dropped
        assert step.samples == [{key: r[key] for key in ("id", "reason", "text")} for r in mine[:SAMPLES]]
    kept = list(read_documents(tmp_path / DOCUMENTS))
    assert len(kept) == funnel.kept
    assert funnel.steps[-1].characters_out == sum(len(document.text) for document in kept)
    assert sorted([d.id for d in kept] + [r["id"] for r in rejects]) == sorted(d.id for d in documents)
    assert all(len(reject["text"]) <= EXCERPT and reject["reason"] for reject in rejects)
    dropping = {step.name for step in funnel.steps if step.dropped}
    assert dropping >= {"too-short", "too-few-letters", "repeated-ngrams", "exact-duplicates", "near-duplicates"}


def test_a_second_pass_changes_nothing(tmp_path):
    run_pipeline(messy_corpus(), default_steps(), tmp_path / "once")
    funnel = run_pipeline(read_documents(tmp_path / "once" / DOCUMENTS), default_steps(), tmp_path / "twice")
    assert funnel.kept == funnel.documents_in
    assert (tmp_path / "once" / DOCUMENTS).read_bytes() == (tmp_path / "twice" / DOCUMENTS).read_bytes()
    assert (tmp_path / "twice" / REJECTS).read_bytes() == b""


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab\u0301\u00a0\u200d. \n", max_size=8), max_size=12))
def test_no_document_is_lost_and_the_second_pass_is_idle(texts, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("funnel")
    documents = [Document("anchor", "some text"), *(Document(str(n), text) for n, text in enumerate(texts))]
    steps = [Clean(), too_short(2), ExactDuplicates()]
    funnel = run_pipeline(documents, steps, folder / "once")
    assert funnel.kept + sum(step.dropped for step in funnel.steps) == len(documents)
    again = run_pipeline(read_documents(folder / "once" / DOCUMENTS), steps, folder / "twice")
    assert again.kept == again.documents_in == funnel.kept


def test_two_runs_write_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        run_pipeline(iter(messy_corpus()), default_steps(), tmp_path / run)
    for name in (DOCUMENTS, REJECTS, FUNNEL):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_report_loads_back_and_prints(tmp_path):
    funnel = run_pipeline(messy_corpus(), default_steps(), tmp_path)
    assert Funnel.load(tmp_path) == funnel
    rows = funnel.to_markdown().splitlines()
    assert len(rows) == 2 + len(funnel.steps)
    assert f"| {funnel.steps[1].name} | {funnel.steps[1].documents_in:,} | {funnel.steps[1].kept:,} |" in rows[3]
    with pytest.raises(DataError, match=r"no readable funnel\.json"):
        Funnel.load(tmp_path / "absent")


def test_progress_counts_documents_read(tmp_path):
    seen = []
    run_pipeline(messy_corpus(size=10), [Clean()], tmp_path, progress=seen.append)
    assert seen == list(range(1, len(messy_corpus(size=10)) + 1))


def test_nothing_left_is_an_error_that_keeps_the_old_output(tmp_path):
    run_pipeline(messy_corpus(), default_steps(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (DOCUMENTS, REJECTS, FUNNEL)}
    with pytest.raises(DataError, match="no document is left of 2; dropped by step: too-short 2"):
        run_pipeline([Document("a", "x"), Document("b", "y")], default_steps(), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_step_that_loses_documents_is_caught(tmp_path):
    class Careless:
        name = "careless"

        def run(self, documents, drop):
            return (document for document in documents if document.id == "a")

    with pytest.raises(DataError, match="step careless: 2 documents came in, but 1 were kept and 0 dropped"):
        run_pipeline([Document("a", "x"), Document("b", "y")], [Careless()], tmp_path)


def test_what_cannot_be_written_names_the_document(tmp_path):
    with pytest.raises(DataError, match="document 'bad': contains half of a surrogate pair"):
        run_pipeline([Document("bad", "\ud83d" * 60)], [too_short()], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="steps with different names"):
        run_pipeline([Document("a", "x")], [Clean(), Clean()], tmp_path)
