import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.corpus.shards import INDEX, TokenDataset, TokenList, check_vocabulary, write_shards
from gristmill.errors import DataError
from gristmill.model.presets import preset

EOS = 0
DOCUMENTS = [([5, 6, 7], None), ([8], None), ([9, 10, EOS], None), (list(range(1, 12)), None)]


def write(directory, documents=DOCUMENTS, **changes):
    settings = {"vocab_size": 100, "tokenizer_hash": "abc", "eos_token_id": EOS, "shard_tokens": 5} | changes
    return write_shards(documents, directory, **settings)


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 70_000), min_size=1, max_size=9), min_size=1, max_size=9),
    shard_tokens=st.integers(1, 30),
)
def test_documents_come_back_with_their_end(documents, shard_tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "s"
    pairs = [(ids, None) for ids in documents]
    dataset = write(folder, pairs, vocab_size=70_001, shard_tokens=shard_tokens)
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == [[*ids, EOS] for ids in documents]
    assert dataset.tokens == sum(map(len, documents)) + len(documents)
    assert dataset.lengths.tolist() == [len(ids) + 1 for ids in documents]
    dataset.verify()


def test_files_are_flat_little_endian_and_documents_stay_whole(tmp_path):
    dataset = write(tmp_path / "s")
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    assert [(shard["documents"], shard["tokens"]) for shard in index["shards"]] == [(2, 6), (2, 15)]
    raw = np.fromfile(tmp_path / "s" / "shard-00000.bin", dtype="<u2")
    assert raw.tolist() == [5, 6, 7, EOS, 8, EOS]
    assert np.fromfile(tmp_path / "s" / "shard-00000.lengths", dtype="<u4").tolist() == [4, 2]
    assert dataset.document(2).tolist() == [9, 10, EOS]  # had its end already
    assert not dataset.document(0).flags.writeable
    assert not dataset.document(0).flags.owndata


def test_wide_vocabularies_take_four_bytes(tmp_path):
    assert write(tmp_path / "a", [([65_535], None)], vocab_size=65_536).document(0).dtype == np.uint16
    wide = write(tmp_path / "b", [([65_536], None)], vocab_size=65_537)
    assert wide.document(0).tolist() == [65_536, EOS]


def test_masks_come_back_and_the_appended_end_is_learned(tmp_path):
    dataset = write(tmp_path / "s", [([5, 6, 7], [0, 0, 1]), ([8, 9, EOS], [0, 1, 0])])
    assert dataset.mask(0).tolist() == [0, 0, 1, 1]
    assert dataset.mask(1).tolist() == [0, 1, 0]
    assert dataset.piece(0, 2, 4)[1].tolist() == [1, 1]
    assert write(tmp_path / "t").mask(0) is None


def test_writing_again_gives_the_same_bytes_and_fingerprint(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert write(tmp_path / "c", [*DOCUMENTS[:3], ([1], None)]).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([([1], None), ([1, 100], None)], "document 1: token id 100 is outside the vocabulary of 100"),
        ([([-1], None)], "document 0: token id -1 is outside"),
        ([([1.5], None)], "document 0: token ids must be whole numbers, got float64"),
        ([([1, 2], [0, 0.5])], "document 0: its loss mask must hold 0 and 1 alone"),
        ([([], None)], "document 0 has no tokens"),
        ([], "there are no documents"),
        ([([1, 2], [1])], "document 0 has 2 tokens, but its loss mask has 1"),
        ([([1, 2], [1, 0])], "document 0: its loss mask trains nothing"),
        ([([1, 2], [0, 1]), ([1, 2], None)], "document 1: loss masks must be given for all documents or for none"),
    ],
)
def test_refused_documents_leave_the_old_shards(tmp_path, documents, message):
    old = write(tmp_path / "s").fingerprint
    with pytest.raises(DataError, match=message):
        write(tmp_path / "s", documents)
    assert TokenDataset.open(tmp_path / "s").fingerprint == old
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_end_token_must_be_in_the_vocabulary(tmp_path):
    with pytest.raises(DataError, match="eos_token_id 100"):
        write(tmp_path / "s", eos_token_id=100)


def edit_index(directory, **changes):
    path = directory / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=r"another tokenizer \(hash abc, expected xyz\)"):
        TokenDataset.open(tmp_path, tokenizer_hash="xyz")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / INDEX).unlink(), r"index.json: cannot be read"),
        (lambda d: (d / INDEX).write_text("{"), "index.json: not JSON"),
        (lambda d: edit_index(d, format="other"), 'field "format"'),
        (lambda d: edit_index(d, version=2), "version 2 is not known"),
        (lambda d: edit_index(d, dtype="O"), 'field "dtype"'),
        (lambda d: edit_index(d, documents=5), "says 5 documents and 21 tokens, but the shards hold 4 and 21"),
        (lambda d: (d / "shard-00001.bin").unlink(), r"shard-00001\.bin: cannot be read"),
        (
            lambda d: (d / "shard-00001.bin").write_bytes(b"\0" * 10),
            r"shard-00001\.bin: 10 bytes, but the index says 15",
        ),
        (
            lambda d: np.array([3, 3], dtype="<u4").tofile(d / "shard-00000.lengths"),
            r"shard-00000\.lengths: SHA-256 differs",
        ),
    ],
)
def test_damage_is_named_when_opened(tmp_path, damage, message):
    write(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        TokenDataset.open(tmp_path / "s")


def test_a_field_missing_from_the_index_is_named(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["masks"], index["tokens"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="missing fields: masks, tokens"):
        TokenDataset.open(tmp_path)


def test_ids_outside_the_vocabulary_are_refused_where_they_are_read(tmp_path):
    write(tmp_path)
    ids = np.fromfile(tmp_path / "shard-00000.bin", dtype="<u2")
    ids[4] = 100
    ids.tofile(tmp_path / "shard-00000.bin")
    dataset = TokenDataset.open(tmp_path)
    assert dataset.document(0).tolist() == [5, 6, 7, EOS]
    with pytest.raises(DataError, match="document 1 holds token id 100, but the vocabulary has 100"):
        dataset.document(1)
    with pytest.raises(DataError, match="document 1 holds token id 100"):
        dataset.read(np.array([[3, 0, 4], [1, 0, 1]]))
    assert [ids.tolist() for ids, _ in dataset.read(np.array([[3, 1, 4], [0, 0, 2]]))] == [[2, 3, 4], [5, 6]]
    with pytest.raises(DataError, match=r"shard-00000\.bin: SHA-256 is"):
        dataset.verify()


def test_lists_in_memory_are_held_to_the_same_rules():
    documents = TokenList([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], vocab_size=10)
    assert documents.lengths.tolist() == [3, 2]
    ids, mask = documents.piece(0, 1, 3)
    assert (ids.tolist(), mask.tolist()) == ([6, 7], [1, 1])
    with pytest.raises(DataError, match="document 0: token id 10"):
        TokenList([([10], None)], vocab_size=10)
    with pytest.raises(DataError, match="trains nothing"):
        TokenList([([1, 2], [0, 0])], vocab_size=10)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    config = dataclasses.replace(preset("tiny"), vocab_size=99)
    with pytest.raises(DataError, match=r"s: the corpus has a vocabulary of 100.* \(vocab_size\) has 99 rows"):
        check_vocabulary(write(tmp_path / "s"), config)
    with pytest.raises(DataError, match="the corpus has a vocabulary of 100"):
        check_vocabulary(TokenList(DOCUMENTS, vocab_size=100), config)
    check_vocabulary(TokenList(DOCUMENTS, vocab_size=100), dataclasses.replace(config, vocab_size=100))
    check_vocabulary(TokenList(DOCUMENTS, vocab_size=100), dataclasses.replace(config, vocab_size=128))
