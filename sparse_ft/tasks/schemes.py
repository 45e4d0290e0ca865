"""Tagging schemes: IOB1, IOB2, BIOES and BMES to IOB2, and entity spans out of tags.

A span is found as conlleval finds it: an entity ends where the type changes, at ``O`` and before ``B-``; an ``I-`` that
follows no entity of its type starts one. https://www.clips.uantwerpen.be/conll2003/ner/
"""

from collections.abc import Sequence
from typing import NamedTuple

from sparse_ft.errors import DataError, unknown_name

# Prefixes of each scheme: those that begin an entity, those that continue one.
SCHEMES: dict[str, tuple[str, str]] = {
    "iob1": ("B", "I"),
    "iob2": ("B", "I"),
    "bioes": ("BS", "IE"),
    "bmes": ("BS", "ME"),
}


class Span(NamedTuple):
    """An entity over words (or characters): ``start`` inclusive, ``end`` exclusive."""

    type: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """Split ``B-PER`` into ``("B", "PER")``; ``O`` gives ``("O", "")``."""
    prefix, _, entity_type = tag.partition("-")
    return prefix, entity_type


def check_scheme(scheme: str) -> None:
    """Refuse an unknown scheme name.

    Raises:
        DataError: With the accepted names.
    """
    if scheme not in SCHEMES:
        raise DataError(unknown_name("label_scheme", scheme, SCHEMES))


def to_iob2(tags: Sequence[str], scheme: str = "iob2") -> list[str]:
    """Convert the tags of one sentence to IOB2.

    Args:
        tags: One tag a word, written in ``scheme``.
        scheme: A key of SCHEMES.

    Returns:
        As many IOB2 tags. A continuation without a beginning starts an entity, so the entities stay those of conlleval.

    Raises:
        DataError: If a tag is not valid in the scheme.
    """
    invalid = first_invalid(tags, scheme)
    begins, continues = SCHEMES[scheme]
    if invalid is not None:
        accepted = ", ".join(f"{letter}-TYPE" for letter in begins + continues)
        raise DataError(
            f"Tag {tags[invalid]!r} at word {invalid + 1} is not valid in label scheme {scheme!r}. "
            f"Expected O, {accepted}. Set label_scheme in the task file to the scheme of the data, or correct the tag."
        )
    converted: list[str] = []
    open_type = ""
    for tag in tags:
        prefix, entity_type = split_tag(tag)
        if not entity_type:
            converted.append("O")
            open_type = ""
            continue
        inside = prefix in continues and entity_type == open_type
        converted.append(("I-" if inside else "B-") + entity_type)
        open_type = "" if scheme in {"bioes", "bmes"} and prefix in "SE" else entity_type
    return converted


def first_invalid(tags: Sequence[str], scheme: str) -> int | None:
    """Find the first tag that the scheme does not have.

    Returns:
        Its position, or None if all are valid.

    Raises:
        DataError: If the scheme is unknown.
    """
    check_scheme(scheme)
    prefixes = set("".join(SCHEMES[scheme]))
    for position, tag in enumerate(tags):
        prefix, entity_type = split_tag(tag)
        if tag != "O" and not (entity_type and prefix in prefixes):
            return position
    return None


def spans_from_tags(tags: Sequence[str]) -> list[Span]:
    """Read the entity spans out of IOB1 or IOB2 tags, as conlleval does.

    Args:
        tags: One tag a word.

    Returns:
        Spans in order, over word positions.
    """
    spans: list[Span] = []
    open_type, start = "", 0
    for position, tag in enumerate([*tags, "O"]):
        prefix, entity_type = split_tag(tag)
        if open_type and (prefix != "I" or entity_type != open_type):
            spans.append(Span(open_type, start, position))
            open_type = ""
        if prefix != "O" and not open_type:
            open_type, start = entity_type, position
    return spans


def tags_from_spans(spans: Sequence[Span], length: int) -> list[str]:
    """Write spans over word positions as IOB2 tags; of overlapping spans the first given wins."""
    tags = ["O"] * length
    for span in spans:
        if all(tag == "O" for tag in tags[span.start : span.end]):
            tags[span.start : span.end] = [f"B-{span.type}"] + [f"I-{span.type}"] * (span.end - span.start - 1)
    return tags
