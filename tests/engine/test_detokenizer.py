"""Text of a growing sequence: whole characters, and never a stop string or a part of one that later completes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from engine.helpers import tokenizer
from gristmill.core import SamplingParams
from gristmill.engine.detokenizer import Detokenizer
from gristmill.tokens.tokenizer import Tokenizer

BYTES = tokenizer()
FFFD = "\N{REPLACEMENT CHARACTER}"


BYTE_TABLE = BYTES.token_bytes
assert BYTE_TABLE is not None
BYTE_IDS = {BYTE_TABLE.join([index], skip_special_tokens=True): index for index in reversed(range(BYTES.vocab_size))}


def byte_ids(data: bytes) -> list[int]:
    """One token per byte: every character of several bytes is spread over tokens."""
    return [BYTE_IDS[bytes([byte])] for byte in data]


def feed(ids: list[int], sizes: list[int], params: SamplingParams) -> tuple[list[str], str | None]:
    """The text after each append, and the stop string found. Without one the end releases the rest."""
    detokenizer = Detokenizer(BYTES, params)
    texts, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        stop = detokenizer.append(ids[at : at + size])
        at, turn = at + size, turn + 1
        texts.append(detokenizer.text)
        if stop is not None:
            return texts, stop
    stop = detokenizer.finish()
    texts.append(detokenizer.text)
    return texts, stop


texts = st.text(alphabet=st.sampled_from("ab\n é三😀👍🏽" + FFFD), max_size=25)
stops = st.lists(st.text(alphabet=st.sampled_from("ab\n é三😀" + FFFD), min_size=1, max_size=4), max_size=3)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def test_bytes_are_tokens() -> None:
    assert BYTES.decode(byte_ids("a é三😀\n".encode())) == "a é三😀\n"


@given(texts, stops, sizes, st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_text_only_grows_and_ends_before_the_first_stop(
    text: str, stop: list[str], parts: list[int], keep: bool, as_bytes: bool
) -> None:
    params = SamplingParams(stop=stop or None, include_stop_str_in_output=keep)
    ids = byte_ids(text.encode()) if as_bytes else BYTES.encode(text)
    seen, found = feed(ids, parts, params)
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before)
    places = sorted((text.index(s), s) for s in stop if s in text)
    if not places:
        assert found is None
        assert seen[-1] == text
        return
    # tokens arrive in parts, so a stop string that ends sooner may be met before one that begins sooner
    assert found is not None
    end = text.index(found)
    assert seen[-1] == text[: end + len(found) if keep else end]
    if not keep:
        assert not any(s in shown for s in stop for shown in seen)
    if parts == [1] and as_bytes:
        assert end + len(found) == min(at + len(s) for at, s in places)


@given(st.binary(max_size=20), sizes)
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_come_out_as_the_plain_decode(data: bytes, parts: list[int]) -> None:
    seen, found = feed(byte_ids(data), parts, SamplingParams())
    assert found is None
    assert seen[-1] == data.decode(errors="replace") == BYTES.decode(byte_ids(data))
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before)


def test_a_character_appears_when_its_last_byte_does() -> None:
    detokenizer = Detokenizer(BYTES, SamplingParams())
    shown = []
    for token in byte_ids("a😀b".encode()):
        detokenizer.append([token])
        shown.append(detokenizer.text)
    assert shown == ["a", "a", "a", "a", "a😀", "a😀b"]


def test_the_beginning_of_a_stop_string_is_held_back_and_released() -> None:
    detokenizer = Detokenizer(BYTES, SamplingParams(stop=["END", "\n\n"]))
    shown = []
    for token in byte_ids(b"xEN\nE"):
        assert detokenizer.append([token]) is None
        shown.append(detokenizer.text)
    assert shown == ["x", "x", "x", "xEN", "xEN\n"]
    assert detokenizer.finish() is None
    assert detokenizer.text == "xEN\nE"


def test_a_stop_string_before_an_unfinished_character_is_found_at_once() -> None:
    """A token may end in the middle of a character; the text before it is text."""
    detokenizer = Detokenizer(BYTES, SamplingParams(stop="END"))
    assert detokenizer.append(byte_ids(b"one END\xf0\x9f")) == "END"
    assert detokenizer.text == "one "


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    ids = BYTES.encode("a<|im_end|>b")
    assert feed(ids, [1], SamplingParams())[0][-1] == "ab"
    assert feed(ids, [1], SamplingParams(skip_special_tokens=False))[0][-1] == "a<|im_end|>b"
    assert feed(ids, [1], SamplingParams(skip_special_tokens=False, stop="<|im_end|>")) == (["a", "a"], "<|im_end|>")


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A decoder that strips the space before the first word, and falls back to bytes that it groups."""
    words = ["▁the", "▁mill", "s", "▁"]
    vocabulary = {word: index for index, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend=backend)


@given(st.lists(st.sampled_from(["the", "mill", "s", "_", *"é三😀"]), max_size=12))
@settings(max_examples=100, deadline=None)
def test_spaces_survive_a_decoder_that_strips_the_first(sentencepiece: Tokenizer, parts: list[str]) -> None:
    words = {"the": [0], "mill": [1], "s": [2], "_": [3]}
    ids = [i for part in parts for i in words.get(part) or [4 + byte for byte in part.encode()]]
    detokenizer = Detokenizer(sentencepiece, SamplingParams())
    before = ""
    for token in ids:
        detokenizer.append([token])
        assert detokenizer.text.startswith(before)
        before = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text == sentencepiece.decode(ids)


SPELLED = ["the", "mill", "s", "_", *"é三😀"]


def spelled_ids(parts: list[str]) -> list[int]:
    words = {"the": [0], "mill": [1], "s": [2], "_": [3]}
    return [i for part in parts for i in words.get(part) or [4 + byte for byte in part.encode()]]


@given(st.lists(st.sampled_from(SPELLED), max_size=12), sizes, st.sets(st.integers(0, 30)))
@settings(max_examples=150, deadline=None)
def test_reading_now_and_then_gives_the_same_text(
    sentencepiece: Tokenizer, parts: list[str], split: list[int], read: set[int]
) -> None:
    """Nothing is decoded before somebody reads; when that is makes no difference, for either kind of tokenizer."""
    for tokens, ids in ((sentencepiece, spelled_ids(parts)), (BYTES, byte_ids("".join(parts).encode()))):
        detokenizer, at, turn, seen = Detokenizer(tokens, SamplingParams()), 0, 0, ""
        while at < len(ids):
            size = split[turn % len(split)]
            assert detokenizer.append(ids[at : at + size]) is None
            at, turn = at + size, turn + 1
            if turn in read:
                assert detokenizer.text.startswith(seen)
                seen = detokenizer.text
        assert detokenizer.finish() is None
        assert detokenizer.text == tokens.decode(ids)


@given(st.lists(st.sampled_from(SPELLED), max_size=12), st.sampled_from(["s", "mill s", "三", "é三", " the"]))
@settings(max_examples=150, deadline=None)
def test_stop_strings_of_any_decoder_never_leak(sentencepiece: Tokenizer, parts: list[str], stop: str) -> None:
    ids = spelled_ids(parts)
    whole = sentencepiece.decode(ids)
    detokenizer, found = Detokenizer(sentencepiece, SamplingParams(stop=stop)), None
    for token in ids:
        found = detokenizer.append([token])
        assert stop not in detokenizer.text
        assert (whole.split(stop)[0] if stop in whole else whole).startswith(detokenizer.text)
        if found:
            break
    found = found or detokenizer.finish()
    assert (found, detokenizer.text) == ((stop, whole.split(stop)[0]) if stop in whole else (None, whole))


def test_a_stop_string_that_came_too_early_is_text() -> None:
    """Before `min_tokens` the caller goes on; what ended there is not found again."""
    detokenizer = Detokenizer(BYTES, SamplingParams(stop=["b", "abc"]))
    assert [detokenizer.append(byte_ids(part)) for part in (b"xa", b"b", b"d")] == [None, "b", None]
    assert detokenizer.text == "xabd"
    assert detokenizer.append(byte_ids(b"ab")) == "b"
    assert detokenizer.text == "xabda"


@given(st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=20), st.booleans(), sizes)
@settings(max_examples=200, deadline=None)
def test_any_tokens_decode_as_the_backend_does(ids: list[int], skip: bool, split: list[int]) -> None:
    backend = Backend.from_str(BYTES.backend.to_str())
    backend.add_tokens(["naïve word", "日本"])  # which no byte-level vocabulary spells like this
    tokens = Tokenizer(backend=backend)
    assert tokens.token_bytes is not None
    params = SamplingParams(skip_special_tokens=skip)
    detokenizer = Detokenizer(tokens, params)
    for at in range(0, len(ids), split[0]):
        detokenizer.append(ids[at : at + split[0]])
    detokenizer.finish()
    assert detokenizer.text == tokens.decode(ids, skip_special_tokens=skip)


tagged = st.lists(st.sampled_from(["a", "b", " ", "\n", "<t>", "</t>", "<", "/t>", "é"]), max_size=14).map("".join)


@example("aabaab", ("aab", "ab"), ["a"], [1], False)
@given(tagged, st.sampled_from([("<t>", "</t>"), ("", "</t>"), ("aab", "ab")]), stops, sizes, st.booleans())
@settings(max_examples=400, deadline=None)
def test_stop_strings_count_only_outside_the_passage(
    text: str, outside: tuple[str, str], wanted: list[str], parts: list[int], keep: bool
) -> None:
    params = SamplingParams(stop=wanted, stop_outside=outside, include_stop_str_in_output=keep)
    since = params.stops_count_from(text)
    plain = SamplingParams(stop=wanted, include_stop_str_in_output=keep)
    rest, expected = feed(byte_ids(text[since:].encode()), parts, plain)
    seen, found = feed(byte_ids(text.encode()), [1], params)
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen))
    assert (seen[-1], found) == (text[:since] + rest[-1], expected)


@pytest.mark.parametrize(
    ("text", "outside", "since"),
    [
        ("<t>a</t>b", ("<t>", "</t>"), 8),
        (" \n<t>a</t>b", ("<t>", "</t>"), 10),
        ("b<t>a</t>b", ("<t>", "</t>"), 0),
        ("a</t>b", ("", "</t>"), 5),
        ("<t>a", ("<t>", "</t>"), 4),
        ("<", ("<t>", "</t>"), 1),
        ("a", None, 0),
    ],
)
def test_where_stop_strings_begin_to_count(text: str, outside: tuple[str, str] | None, since: int) -> None:
    assert SamplingParams(stop_outside=outside).stops_count_from(text) == since
