import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.corpus.clean import Clean, clean_text
from gristmill.corpus.document import Document

AWKWARD = "ae=<\u0301\u0338\u0300\u212a\u212b\u00e9\u0645\u06cc\U0001f468\u2212 \u00a0\u3000\u2009\t\n\r\x0b\x00\x85"
AWKWARD += "\u2028\u200b\u200c\u200d\u200e\u202e\u2060\ufeff\u00ad\ud800.("


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("19\u00a0BC, c.\u20091308", "19 BC, c. 1308"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("soft\u00adhyphen, zero\u200bwidth, word\u2060joiner, \ufeffmark", "softhyphen, zerowidth, wordjoiner, mark"),
        ("evil\u202etxt\u202c", "eviltxt"),
        ("null\x00 bell\x07 delete\x7f", "null bell delete"),
        ("\u2212\u200d(\u22123) = 3", "\u2212(\u22123) = 3"),
        ("a   b \nc", "a b\nc"),
        ("if x:\n    return  1\n\n\n\nend", "if x:\n    return 1\n\nend"),
        ("half a pair \ud83d here", "half a pair here"),
    ],
)
def test_repairs(raw, clean):
    assert clean_text(raw) == clean


def test_keeps_joiners_where_scripts_and_emoji_need_them():
    persian, family = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert clean_text(persian) == persian
    assert clean_text(family) == family


@given(st.one_of(st.text(), st.text(alphabet=AWKWARD, max_size=12)))
def test_is_idempotent_and_leaves_plain_text(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in once if character not in "\n\t")
    once.encode("utf-8")


def test_step_cleans_metadata_and_drops_what_is_empty():
    drops = []
    documents = [Document("a", "x\u00a0y", {"title": "x\u00a0y"}), Document("b", "\u200b \n")]
    kept = list(Clean().run(documents, lambda document, reason: drops.append((document.id, reason))))
    assert kept == [Document("a", "x y", {"title": "x y"})]
    assert drops == [("b", "no text left")]
