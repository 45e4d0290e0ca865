"""Split raw text into words as annotated corpora do, with character offsets, and classify how a word is written."""

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
_CHUNK = re.compile(rf"[{_SINGLE}]|[^\s{_SINGLE}]+")
# Inside a chunk: clitics and edge punctuation are words of their own; U.S., 3.5 and mother-in-law are one word.
_WORD = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                      # U.S.  e.g.
  | \d+(?:[.,:/-]\d+)*                      # 3.5  12,400  1996-08-22  10:30  2-1
    (?:[^\W\d_]+)?                          # 5km  1st
  | (?:n['’]t|['’](?:s|re|ve|ll|d|m))(?!\w)  # clitics
  | \w+?(?=n['’]t(?!\w))                    # did|n't
  | \w[\w\u0300-\u036f]*                  # mother-in-law  O'Neil  AT&T  example.org
    (?:[-&@.+_'’](?!(?:s|re|ve|ll|d|m)(?!\w))\w[\w\u0300-\u036f]*)*
  | (.)\1*                                  # punctuation, a run of one character together
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)

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


def split_words(text: str, language: str = "en") -> list[Word]:
    """Split text into words.

    Args:
        text: Any text, also an empty one.
        language: ``zh``, ``zh-CN`` and the like make every character except white space a word, as in Chinese corpora.

    Returns:
        Words in order; ``text[word.start:word.end] == word.text`` holds for each.
    """
    if language.lower().partition("-")[0] == "zh":
        return [Word(character, start, start + 1) for start, character in enumerate(text) if not character.isspace()]
    words: list[Word] = []
    for chunk in _CHUNK.finditer(text):
        for match in _WORD.finditer(chunk.group()):
            start, end = chunk.start() + match.start(), chunk.start() + match.end()
            if words and words[-1].end == start and _continues(words[-1].text[-1], text[start]):
                start = words.pop().start
            words.append(Word(text[start:end], start, end))
    return words


def join_words(words: Sequence[str]) -> str:
    """Join words to a text, with spaces except in scripts that are written without spaces."""
    return re.sub(rf"(?<=[{_SINGLE}]) (?=[{_SINGLE}])", "", " ".join(words))


def _continues(before: str, after: str) -> bool:
    """Tell whether two adjacent characters belong to one word because of a vowel sign, a soft hyphen or the like."""
    if _combines(after):
        return before.isalnum() or _combines(before)
    return _combines(before) and after.isalnum() and _ALONE.match(after) is None


def _combines(character: str) -> bool:
    """Tell whether a character modifies the one before it, or is invisible, so that a tokenizer may drop it."""
    return character == "\u00ad" or (character > "\u02ff" and unicodedata.category(character) in _COMBINING)


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
