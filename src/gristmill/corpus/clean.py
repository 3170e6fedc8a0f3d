"""Repair text without changing what it says: one Unicode form, no invisible debris, plain white space.

`clean_text` is idempotent, so cleaning a cleaned corpus changes nothing.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from gristmill.corpus.document import Document
from gristmill.corpus.step import Drop

_LINE_BREAKS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_JOINERS = re.compile("[\u200c\u200d]+")
_SPACE_RUN = re.compile(r"(?<=[^ \n]) {2,}")
_TRAILING = re.compile(r"[ \t]+(?=\n)")
_BLANK_LINES = re.compile(r"\n{3,}")

# Soft hyphen, zero-width space, word joiner and its invisible-operator kin, byte-order mark, direction controls.
_INVISIBLE = [0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF]


def _translation() -> dict[int, str | None]:
    surrogates = range(0xD800, 0xE000)
    table: dict[int, str | None] = dict.fromkeys([*_INVISIBLE, *surrogates])
    for code in range(0x3001):  # the ideographic space is the last of the controls and spaces
        category = unicodedata.category(chr(code))
        if category == "Cc" and chr(code) not in "\n\t":
            table[code] = None
        elif category == "Zs":
            table[code] = " "
    return table


_TABLE = _translation()


def clean_text(text: str) -> str:
    """NFC; control, direction and zero-width characters removed; white space and line breaks made plain.

    Indentation and tabs stay. Joiners (U+200C, U+200D) stay between non-ASCII letters and symbols, where Persian,
    Indic scripts and emoji need them.
    """
    text = _LINE_BREAKS.sub("\n", unicodedata.normalize("NFC", text)).translate(_TABLE)
    text = _JOINERS.sub(_kept_joiner, text)
    # Removing what stood between a letter and its accent lets the two compose.
    text = unicodedata.normalize("NFC", text)
    text = _TRAILING.sub("", _SPACE_RUN.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def _kept_joiner(match: re.Match[str]) -> str:
    text, start, end = match.string, match.start(), match.end()
    inside = start > 0 and end < len(text)
    return match.group() if inside and _is_joinable(text[start - 1]) and _is_joinable(text[end]) else ""


def _is_joinable(character: str) -> bool:
    return character > "\x7f" and unicodedata.category(character)[0] in "LMS"


@dataclass(frozen=True)
class Clean:
    """Apply `clean_text` to the text and the metadata values; a document that has no text left is dropped."""

    name: str = "clean"

    def run(self, documents: Iterable[Document], drop: Drop) -> Iterator[Document]:
        """Yield the cleaned documents."""
        for document in documents:
            text = clean_text(document.text)
            if not text:
                drop(document, "no text left")
                continue
            yield replace(
                document, text=text, metadata={key: clean_text(value) for key, value in document.metadata.items()}
            )
