"""How alike two answers are, as the evaluation script of CMRC 2018 says, which CLUE uses for CMRC 2018 and DRCD.

Published: https://github.com/ymcui/cmrc2018/blob/c0eb1b6ba219847457e6af3180da722bbeb656af/squad-style-data/cmrc2018_evaluate.py
That script leaves what is not Chinese to NLTK's word_tokenize. Here a rule does it; of the 9,657 answers of CMRC's
development set it divides 3 differently than NLTK 3.10.4, at a dash between coordinates, and does not tell opening from
closing quotation marks.
"""

import re
from difflib import SequenceMatcher

_DROPPED = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_SEGMENT = re.compile(
    r"""
    [\u4e00-\u9fa5]                                        # a Chinese character
  | (?:[^\s\u4e00-\u9fa5,;@#$%&?!"'()\[\]{}<>]|(?<=\d),(?=\d))+  # a word or number: U.S.  12,400  cd11a  300mb
  | \S                                                    # any other sign
    """,
    re.VERBOSE,
)


def exact_match(reference: str, prediction: str) -> bool:
    """Tell whether two answers are the same but for case and punctuation."""
    return _plain(reference) == _plain(prediction)


def answer_f1(reference: str, prediction: str) -> float:
    """Return the harmonic mean of the shares that the longest common run of segments has of each answer, 0 to 1.

    A Chinese character is a segment, else a word or a number is.
    """
    right, given = segments(reference), segments(prediction)
    matcher = SequenceMatcher(None, right, given, autojunk=False)
    common = matcher.find_longest_match(0, len(right), 0, len(given)).size
    return 2 * common / (len(right) + len(given)) if common else 0.0


def segments(text: str) -> list[str]:
    """Divide an answer into what is compared, without case and punctuation."""
    return _SEGMENT.findall(_plain(text))


def _plain(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _DROPPED)
