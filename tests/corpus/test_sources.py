import json
import logging

import pytest

from gristmill.corpus.document import Document
from gristmill.corpus.sources import (
    BLANK_LINE,
    read_documents,
    read_jsonl,
    read_text,
    read_wikipedia_summaries,
    summary_body,
)
from gristmill.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    def write(content, name="news.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_reads_jsonl_with_ids_and_metadata(corpus):
    path = corpus('{"text": "one", "url": "u", "score": 0.5, "tags": ["x"]}\n\n{"text": "two"}\r\n')
    assert list(read_jsonl(path)) == [
        Document("news.jsonl:1", "one", {"url": "u", "score": "0.5", "tags": '["x"]'}),
        Document("news.jsonl:3", "two", {}),
    ]
    assert next(read_jsonl(path, text_field="url", id_field="text")).id == "one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "fine"}\n{"title": "t", "body": "longer"}\n',
            r'news.jsonl line 2: field "text" is missing \(found: title, body\). Use --text_field body, or --on_error',
        ),
        (b'{"text": "fine"}\n{"text": 3}\n', r'line 2: field "text" must be a string, found a number'),
        (b'{"text": "fine"}\n{"text": "cut\n', r"news.jsonl line 2, column \d+: not JSON"),
        (b'{"text": "fine"}\n["text"]\n', "line 2: expected a JSON object, found list"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', r"line 2: not UTF-8 at byte 30 \(0xe9\)"),
    ],
)
def test_broken_lines_are_named_and_can_be_skipped(corpus, caplog, content, message):
    path = corpus(content)
    with pytest.raises(DataError, match=message):
        list(read_jsonl(path))
    with caplog.at_level(logging.WARNING):
        documents = list(read_jsonl(path, on_error="skip"))
    assert [document.text for document in documents] == ["fine"]
    assert len(caplog.records) == 1
    assert "line 2" in caplog.text


def test_the_named_byte_is_the_bad_one(corpus):
    content = '{"text": "gr\u00fc\u00dfe"}\n'.encode() * 50 + b'{"text": "caf\xe9"}\n'
    with pytest.raises(DataError, match=rf"line 51: not UTF-8 at byte {content.index(0xE9)} "):
        list(read_jsonl(corpus(content)))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"not json\n"])
def test_an_empty_corpus_is_refused(corpus, content):
    with pytest.raises(DataError, match="the corpus is empty"):
        list(read_jsonl(corpus(content), on_error="skip"))


def test_a_missing_file_is_named(tmp_path):
    for reader in (read_jsonl, read_text, read_wikipedia_summaries, read_documents):
        with pytest.raises(DataError, match=r"absent\.x"):
            list(reader(tmp_path / "absent.x"))


def test_reads_text_whole_or_in_parts(corpus):
    path = corpus("one\r\nmore\r\n\r\n \r\n\r\ntwo\n---\n\n\nthree\n", "book.txt")
    assert [document.id for document in read_text(path)] == ["book.txt"]
    assert list(read_text(path, BLANK_LINE)) == [
        Document("book.txt#1", "one\nmore"),
        Document("book.txt#2", "two\n---"),
        Document("book.txt#3", "three"),
    ]
    assert [document.text for document in read_text(path, "---\n")] == ["one\nmore\n\n \n\ntwo", "three"]


def test_reads_a_folder_in_order(corpus, tmp_path):
    corpus("second", "b.txt")
    corpus("first", "a.txt")
    corpus("other", "c.md")
    assert [(document.id, document.text) for document in read_text(tmp_path)] == [
        ("a.txt", "first"),
        ("b.txt", "second"),
    ]


def test_text_that_is_not_utf8_or_empty_is_refused(corpus):
    with pytest.raises(DataError, match=r"latin.txt line 2: not UTF-8 at byte 9 \(0xe9\)"):
        list(read_text(corpus(b"plain\ncaf\xe9", "latin.txt")))
    with pytest.raises(DataError, match="the corpus is empty"):
        list(read_text(corpus(" \n", "empty.txt")))


def test_reads_wikipedia_summaries(corpus):
    article = {"title": "Silo", "extract": "A silo stores bulk.", "description": "Store", "topic": "Technology"}
    (document,) = read_wikipedia_summaries(corpus(json.dumps({"Silo": article})))
    assert document.id == "Silo"
    assert document.text == "Silo\n\nA silo stores bulk."
    assert document.metadata == {"title": "Silo", "topic": "Technology", "description": "Store"}
    assert summary_body(document) == "A silo stores bulk."
    with pytest.raises(DataError, match="does not begin with its title"):
        summary_body(Document("x", "text", {"title": "other"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Silo": {"title": "Silo"}}', r"article 'Silo': field \"extract\" is missing \(found: title\)"),
        ('{"Silo": 1}', "article 'Silo': expected a JSON object, found a number"),
        ("[]", "expected a JSON object of articles by title, found an array"),
        ('{\n"Silo": }', "line 2 column 9: not JSON"),
        ("{}", "the corpus is empty"),
    ],
)
def test_broken_summaries_are_named(corpus, content, message):
    with pytest.raises(DataError, match=message):
        list(read_wikipedia_summaries(corpus(content)))
