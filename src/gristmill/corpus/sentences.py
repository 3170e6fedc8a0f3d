"""The first sentence of a text, with the care that abbreviations, initials and brackets need. English rules."""

import re


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Never end a sentence: a name or a number always follows.
_LEADING = _set("""
    mr mrs ms messrs dr prof st ste mt ft gen col lt sgt cpl capt cmdr adm rev hon gov sen rep pres supt
    vs viz cf ca c e.g i.e b d r fl approx lit pron lat gr ger var subsp ssp wm geo jas chas
    jan feb apr aug sept oct nov dec""")
# Stand before a number; before anything else they are words or end a sentence.
_NUMBERED = _set("no nos vol vols ch pp p fig figs sec art op est v mar jun jul")
# End a sentence only when the next word is one that begins sentences.
_EITHER = _set("jr sr inc ltd co corp bros al esq univ ave blvd dept spp")
_STARTERS = _set("""
    the a an it its he his she her they their this that these those there in on at by for from with as to of when
    while although though because since after before during until however moreover also both many most some several
    all each other others if today he's it's we our you one two three born according known despite unlike like
    under over among between following along within through such not historically originally""")
_END = re.compile(r"([.!?]+)([\"'”’)\]]*)(?=\s|$)|[。！？]+[”’」』）]*")
_TOKEN = re.compile(r"[^\s(\[\"“‘—–/]*$")
_NEXT = re.compile(r"\s*[\"'“‘(\[]*(\S*)")


def first_sentence(text: str) -> str:
    """The text up to and with the end of its first sentence, on one line; all of the first paragraph if none ends.

    A stop inside brackets, after an abbreviation, an initial or before a lower-case word does not end a sentence.
    """
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    for respect_brackets in (True, False):
        depth = position = 0
        for match in _END.finditer(paragraph):
            depth = max(depth + _depth(paragraph[position : match.start()]), 0)
            position = match.start()
            # A bracket that closes right after the stop belongs to the sentence.
            inside = depth + _depth(match.group()) > 0
            if not (respect_brackets and inside) and _ends(paragraph, match):
                return paragraph[: match.end()]
        if depth + _depth(paragraph[position:]) <= 0:
            break  # brackets are balanced, so they were rightly respected
    return paragraph


def _depth(text: str) -> int:
    return text.count("(") + text.count("[") - text.count(")") - text.count("]")


def _ends(text: str, match: re.Match[str]) -> bool:
    if match.group(1) is None or match.end() == len(text):
        return True  # a full-width stop, or the end
    following = _NEXT.match(text, match.end())
    word = following.group(1) if following else ""
    if word[:1].islower():
        return False
    if match.group(1) != "." or match.group(2):
        return True
    token_match = _TOKEN.search(text, 0, match.start())
    token = token_match.group() if token_match else ""
    starts = word.rstrip(",;:").lower() in _STARTERS
    if _is_initial(token):
        # "World War I. The war" ends, "I. M. Pei" and "J. A. Smith" do not: "A." is no word.
        return starts
    lower = token.lower()
    if lower in _NUMBERED:
        return not word[:1].isdigit()
    if lower in _EITHER or re.fullmatch(r"(?:[A-Za-z]{1,2}\.)+[A-Za-z]{1,2}", token):
        return lower not in _LEADING and starts
    return lower not in _LEADING


def _is_initial(token: str) -> bool:
    return len(token) == 1 and token.isupper()
