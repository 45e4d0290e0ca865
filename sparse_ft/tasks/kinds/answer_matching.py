"""Compare two answers as the evaluation script of CMRC 2018 does, which CLUE uses for CMRC 2018 and DRCD.

Source: https://github.com/ymcui/cmrc2018/blob/c0eb1b6ba219847457e6af3180da722bbeb656af/squad-style-data/cmrc2018_evaluate.py
That script splits text that is not Chinese with NLTK's word_tokenize, here a regular expression does. On the 9,657
answers of CMRC's development set, it splits 3 differently than NLTK 3.10.4, at a dash between coordinates. It does not
tell opening from closing quotation marks.
"""

import re
from difflib import SequenceMatcher

_DROPPED = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_SEGMENT = re.compile(
    r"""
    [\u4e00-\u9fa5]                                        # a Chinese character
  | (?:[^\s\u4e00-\u9fa5,;@#$%&?!"'()\[\]{}<>]|(?<=\d),(?=\d))+  # a word or number: U.S.  12,400  cd11a  300mb
  | \S                                                    # any other character
    """,
    re.VERBOSE,
)


def exact_match(reference: str, prediction: str) -> bool:
    """Tell whether two answers are equal up to case and punctuation."""
    return _plain(reference) == _plain(prediction)


def answer_f1(reference: str, prediction: str) -> float:
    """Return the F1 of the longest common run of segments: the harmonic mean of its shares of both answers, 0 to 1."""
    right, guess = segments(reference), segments(prediction)
    matcher = SequenceMatcher(None, right, guess, autojunk=False)
    common = matcher.find_longest_match(0, len(right), 0, len(guess)).size
    return 2 * common / (len(right) + len(guess)) if common else 0.0


def segments(text: str) -> list[str]:
    """Split an answer, without case and punctuation, into Chinese characters, words and numbers."""
    return _SEGMENT.findall(_plain(text))


def _plain(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _DROPPED)
