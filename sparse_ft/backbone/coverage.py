"""Whether a tokenizer was made for the script of a text, measured by what it does to the letters."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from sparse_ft.backbone.words import is_single

_TEXTS = 200
"""Most texts of a sample."""
_CHARACTERS = 300
"""Most characters of a text in the sample."""
_LETTERS = 100
"""Fewest letters that a sample says something with."""
_UNKNOWN = 0.2
"""Share of unknown letters from which a tokenizer does not fit; English, German, Finnish or Polish on MiniLM have 0,
Chinese has 0.78."""
_PIECES = 0.75
"""Pieces a letter, likewise, in scripts with spaces: on MiniLM English has 0.19, Polish 0.55, Russian 0.98."""
_PIECES_OF_SINGLE = 1.3
"""The same where every character is a word: Chinese on a tokenizer of bytes has 2 to 3."""


def misfit(tokenizer: Any, texts: Sequence[str]) -> str | None:
    """Say what a tokenizer does to the letters of texts whose script it was not made for; None if it fits.

    Args:
        tokenizer: A fast tokenizer of transformers.
        texts: Any texts, of which a fixed sample is looked at.
    """
    sample = [text[:_CHARACTERS] for text in texts[:: max(1, len(texts) // _TEXTS)][:_TEXTS]]
    encoded = tokenizer(sample, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if sample else {}
    letters = single = known = pieces = 0
    for text, ids, spans in zip(sample, encoded.get("input_ids", []), encoded.get("offset_mapping", []), strict=True):
        are_letters = [character.isalpha() or unicodedata.category(character)[0] == "M" for character in text]
        letters += sum(are_letters)
        single += sum(map(is_single, text))
        inside = [(id, span) for id, span in zip(ids, spans, strict=True) if any(are_letters[slice(*span)])]
        pieces += len(inside)
        covered = {index for id, span in inside if id != tokenizer.unk_token_id for index in range(*span)}
        known += sum(are_letters[index] for index in covered)
    if letters < _LETTERS:
        return None
    if letters - known >= _UNKNOWN * letters:
        return f"it does not know {(letters - known) / letters:.0%} of the letters".replace("%", " %")
    if pieces > _PIECES * (letters - single) + _PIECES_OF_SINGLE * single:
        return f"it cuts the words into single letters or bytes, {pieces / letters:.1f} pieces a letter"
    return None
