"""Split raw text into words as annotated corpora do, with character offsets, and classify how a word is written."""

import functools
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# Scripts written without spaces: every character is a word, as in all Chinese tagging corpora.
_SINGLE = (
    "\u2e80-\u2fff\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff64\uff65"
    "\U00020000-\U0003ffff"
)
_ALONE = re.compile(f"[{_SINGLE}]")
_COMBINING = ("Mn", "Mc", "Me", "Cf")
# Characters without a shape: control characters, soft hyphen, zero-width space, marks of direction, U+FEFF, and U+FFFD,
# which stands for a lost character. Tokenizers drop them, so they neither divide a word nor begin or end one.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufffd]"
)
LINE_BREAK = re.compile("[\n\r\v\f\x85\u2028\u2029]")
_CHUNK = re.compile(rf"[{_SINGLE}]|[^\s{_SINGLE}]+")

# French l'Allemagne, Italian dell'Italia: in these languages an apostrophe ends the shortened word before it.
_ELIDING = "ca co eo fr frp fur ga gd gsw ht it lb lij lmo mt nap oc pcd pms pt rm sc scn vec wa".split()  # noqa: SIM905
# Turkish Ankara'da, Finnish Bordeaux'n, Polish Smith'a: here it begins the ending of a name.
_SUFFIXING = ["cy", "et", "fi", "lt", "pl", "tr"]
_UPPER, _LOWER = "A-ZÀ-ÖØ-ÞĞİŞ", "a-zß-öø-ÿğış"
_ELIDED = rf"""
    (?!(?-i:[OÓ]['’][{_UPPER}])|(?:aujourd|presqu|prud|quelqu)['’])  # O'Brien and aujourd'hui are one word
    [^\W\d_](?:[^\W\d_]|[\u0300-\u036f])*['’](?=\w)(?!(?:s|t|re|ve|ll|d|m)(?!\w))
"""


def _word_pattern(*, elided: str = "(?!)", apostrophe: str = "['’]", ending: str = "(?!)") -> re.Pattern[str]:
    """Build the pattern of the words of a chunk.

    Clitics and edge punctuation are words of their own; U.S., 3.5 and mother-in-law are one word.

    Args:
        elided: Pattern of a shortened word that ends with an apostrophe.
        apostrophe: Pattern of an apostrophe inside a word.
        ending: Pattern of an ending that begins with an apostrophe.
    """
    return re.compile(
        rf"""
        (?:[^\W\d_]\.){{2,}}                    # U.S.  e.g.
      | {elided}                              # l'
      | \d+(?:[.,:/-]\d+)*                    # 3.5  12,400  1996-08-22  10:30  2-1
        (?:[^\W\d_]+)?                        # 5km  1st
      | (?:n['’]t|['’](?:s|re|ve|ll|d|m))(?!\w)  # clitics
      | \w+?(?=n['’]t(?!\w))                  # did|n't
      | \w[\w\u0300-\u036f]*                  # mother-in-law  O'Neil  AT&T  example.org
        (?:(?:[-&@.+_]|{apostrophe})(?!(?:s|re|ve|ll|d|m)(?!\w))\w[\w\u0300-\u036f]*)*
      | {ending}                              # 'da
      | (.)\1*                                # punctuation, a run of one character together
        """,
        re.VERBOSE | re.IGNORECASE | re.DOTALL,
    )


_WORD = _word_pattern()
_WORD_ELIDING = _word_pattern(elided=_ELIDED)
_WORD_SUFFIXING = _word_pattern(  # O'Brien'ın: O'Brien 'ın
    apostrophe=rf"(?-i:['’](?=[{_UPPER}][{_LOWER}]))", ending=r"(?<=[\w.])['’]\w[\w\u0300-\u036f]*"
)
_ADDRESS = re.compile(r"@|://|^www\.", re.IGNORECASE)

SHAPES = ("none", "number", "punctuation", "code", "lower", "upper", "letter", "title", "mixed")
"""How a word is written. ``none`` stands for special tokens and padding, whose vector is always 0.

Examples of the others, in order: 12, "!", 5km, house, NATO, J., London, McDonald.
"""

BLANK = "____"
"""The blank in a text, to be filled with one of several words."""


class Word(NamedTuple):
    """A word with its first character ``start`` and ``end``, one past its last, in the text as given."""

    text: str
    start: int
    end: int


def is_single(character: str) -> bool:
    """Whether a character belongs to a script in which every character is a word."""
    return _ALONE.fullmatch(character) is not None


@functools.lru_cache(maxsize=1024)  # every task of a call reads the same texts
def split_words(text: str, language: str = "en") -> tuple[Word, ...]:
    """Split text into words.

    A word ends at a full stop that no space follows ("liked it.Jonas left"). Invisible characters at its edges do not
    belong to it. Apostrophes divide words as the language does: "do n't", "l' Allemagne", "Ankara 'da".

    Args:
        text: Any text, also an empty one.
        language: Language tag. ``zh``, ``zh-CN`` and the like make every character except white space a word, as in
            Chinese corpora.

    Returns:
        Words in order; ``text[word.start:word.end] == word.text`` holds for each.
    """
    visible = _INVISIBLE.sub("", text)
    spans = _word_spans(visible, language.lower().partition("-")[0])
    if visible == text:
        return tuple(Word(text[start:end], start, end) for start, end in spans)
    at = [index for index, character in enumerate(text) if _INVISIBLE.match(character) is None]
    return tuple(Word(text[at[start] : at[end - 1] + 1], at[start], at[end - 1] + 1) for start, end in spans)


def _word_spans(text: str, language: str) -> list[tuple[int, int]]:
    """Return the first character and the end of each word of a text without invisible characters."""
    if language == "zh":
        return [(start, start + 1) for start, character in enumerate(text) if not character.isspace()]
    pattern = _WORD_ELIDING if language in _ELIDING else _WORD_SUFFIXING if language in _SUFFIXING else _WORD
    spans: list[tuple[int, int]] = []
    for chunk in _CHUNK.finditer(text):
        for begin, end in pairwise([chunk.start(), *_full_stops(chunk), chunk.end()]):
            for match in pattern.finditer(text[begin:end]):
                start = begin + match.start()
                if spans and spans[-1][1] == start and _continues(text[start - 1], text[start]):
                    start = spans.pop()[0]
                spans.append((start, begin + match.end()))
    return spans


def _full_stops(chunk: re.Match[str]) -> list[int]:
    """Return where a sentence ends inside a chunk: before and after each full stop that no space follows."""
    text = chunk.group()
    if "." not in text or _ADDRESS.search(text):
        return []
    stops = [index for index in range(2, len(text) - 1) if text[index] == "." and _ends_sentence(text, index)]
    return [chunk.start() + edge for stop in stops for edge in (stop, stop + 1)]


def _ends_sentence(text: str, stop: int) -> bool:
    """Tell a full stop between words (it.Jonas, USA.She) from one inside a word (example.org, ASP.NET, e.V).

    Before it stand two characters of a word, after it no lower-case letter; after a capital or a digit, a capitalised
    word.
    """
    before, last, first = text[stop - 2], text[stop - 1], text[stop + 1]
    if not first.isalpha() or first.islower():
        return False
    if not all(character.isalnum() or _combines(character) for character in (before, last)):
        return False
    return text[stop + 2 : stop + 3].islower() if last.isupper() or last.isdigit() else True


def join_words(words: Sequence[str]) -> str:
    """Join words to a text, with spaces except in scripts that are written without spaces."""
    return re.sub(rf"(?<=[{_SINGLE}]) (?=[{_SINGLE}])", "", " ".join(words))


def _continues(before: str, after: str) -> bool:
    """Tell whether two adjacent characters belong to one word because of a vowel sign, a joiner or the like."""
    if _combines(after):
        return before.isalnum() or _combines(before)
    return _combines(before) and after.isalnum() and _ALONE.match(after) is None


def _combines(character: str) -> bool:
    """Tell whether a character modifies the one before it, so that a tokenizer may drop it."""
    return character > "\u02ff" and unicodedata.category(character) in _COMBINING


def line_starts(words: Sequence[Word], text: str) -> set[int]:
    """Return the indices of the words, the first one excepted, that begin a line of the text."""
    pairs = enumerate(pairwise(words), start=1)
    return {index for index, (left, right) in pairs if LINE_BREAK.search(text, left.end, right.start)}


def cut_words(words: Sequence[Word], boundaries: set[int]) -> list[Word]:
    """Cut words at the character positions inside them, so that no annotated span ends within a word.

    Args:
        words: Words in order.
        boundaries: Character positions in the text.
    """
    cut: list[Word] = []
    for word in words:
        inner = [position for position in sorted(boundaries) if word.start < position < word.end]
        edges = [word.start, *inner, word.end]
        cut.extend(Word(word.text[begin - word.start : end - word.start], begin, end) for begin, end in pairwise(edges))
    return cut


def word_shape(word: str) -> int:
    """Return the shape of a word, an index in SHAPES; letters without case count as lower."""
    letters = [character for character in word if character.isalpha()]
    digits = any(character.isdigit() for character in word)
    if not letters:
        return SHAPES.index("number" if digits else "punctuation")
    if digits:
        return SHAPES.index("code")
    capitals = [character.isupper() for character in letters]
    if not any(capitals):
        return SHAPES.index("lower")
    if all(capitals):
        return SHAPES.index("upper" if len(letters) > 1 else "letter")
    return SHAPES.index("title" if capitals[0] and not any(capitals[1:]) else "mixed")
