"""The whole road on the real summaries."""

import pytest

from gristmill.corpus.funnel import DOCUMENTS, default_steps, run_pipeline
from gristmill.corpus.sentences import first_sentence
from gristmill.corpus.sources import read_documents, read_wikipedia_summaries, summary_body

pytest.importorskip("rensa")


@pytest.mark.asset
def test_real_summaries_pass_nearly_whole(tmp_path):
    from gristmill import assets

    funnel = run_pipeline(read_wikipedia_summaries(assets.get("wikipedia-summaries")), default_steps(), tmp_path)
    assert funnel.documents_in == 10_033
    assert funnel.kept >= 10_000
    documents = list(read_documents(tmp_path / DOCUMENTS))
    ended = sum(first_sentence(summary_body(document)).endswith((".", '."', '".', ".)")) for document in documents)
    assert ended >= 0.999 * len(documents)
