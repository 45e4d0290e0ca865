"""Tagging schemes: convert the tags of any scheme to IOB2, and tags to entity spans.

Spans are those of conlleval: an entity ends where the type changes, at ``O`` and before ``B-``. An ``I-`` that follows
no entity of its type starts one. https://www.clips.uantwerpen.be/conll2003/ner/
"""

from collections.abc import Sequence
from typing import NamedTuple

from sparse_ft.errors import DataError, unknown_name

SCHEMES: dict[str, tuple[str, str]] = {
    "iob1": ("B", "I"),
    "iob2": ("B", "I"),
    "ioe1": ("", "IE"),
    "ioe2": ("", "IE"),
    "bios": ("BS", "I"),
    "bioes": ("BS", "IE"),
    "bilou": ("BU", "IL"),
    "bmes": ("BS", "ME"),
}
"""Prefixes of each scheme: those that begin an entity, and those that continue one."""

_ALIASES = {
    "iob": "iob1", "io": "iob1", "bio": "iob2", "bio2": "iob2", "iobes": "bioes", "iobs": "bios", "bioul": "bilou",
    "biluo": "bilou", "bmeso": "bmes", "bmeos": "bmes",
}  # fmt: skip
"""Other names of the schemes."""
_ENDS = "SEUL"
"""Prefixes of the last word of an entity."""


class Span(NamedTuple):
    """An entity over words (or characters): ``start`` inclusive, ``end`` exclusive."""

    type: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """Split ``B-PER`` into ``("B", "PER")``; ``O`` gives ``("O", "")``."""
    prefix, _, entity_type = tag.partition("-")
    return prefix, entity_type


def to_iob2(tags: Sequence[str], scheme: str = "iob2") -> list[str]:
    """Convert the tags of one sentence to IOB2.

    Args:
        tags: One tag per word, all valid (see ``first_invalid``) in ``scheme``.
        scheme: A key of SCHEMES, or another name of one.

    Returns:
        As many IOB2 tags. A continuation without a beginning starts an entity, so conlleval finds the same entities.
    """
    _, continues = SCHEMES[scheme_name(scheme)]
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
        open_type = "" if prefix in _ENDS else entity_type
    return converted


def scheme_name(scheme: str) -> str:
    """Return the key in SCHEMES of a scheme, whose name may be written in capitals or be another usual one.

    Raises:
        DataError: If the scheme is unknown.
    """
    name = _ALIASES.get(scheme.lower(), scheme.lower())
    if name not in SCHEMES:
        raise DataError(unknown_name("label_scheme", scheme, SCHEMES))
    return name


def first_invalid(tags: Sequence[str], scheme: str) -> int | None:
    """Find the first tag that is not valid in the scheme.

    Returns:
        The index of the tag, or None if all are valid.

    Raises:
        DataError: If the scheme is unknown.
    """
    prefixes = set("".join(SCHEMES[scheme_name(scheme)]))
    for index, tag in enumerate(tags):
        prefix, entity_type = split_tag(tag)
        if tag != "O" and not (entity_type and prefix in prefixes):
            return index
    return None


def schemes_of(tags: Sequence[str]) -> list[str]:
    """List the schemes in which all tags are valid, those with the fewest prefixes first."""
    fitting = [scheme for scheme in SCHEMES if first_invalid(tags, scheme) is None]
    return sorted(fitting, key=lambda scheme: len("".join(SCHEMES[scheme])))


def spans_from_tags(tags: Sequence[str]) -> list[Span]:
    """Convert IOB1 or IOB2 tags, one per word, to the entity spans of conlleval, in order."""
    spans: list[Span] = []
    open_type, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, entity_type = split_tag(tag)
        if open_type and (prefix != "I" or entity_type != open_type):
            spans.append(Span(open_type, start, index))
            open_type = ""
        if prefix != "O" and not open_type:
            open_type, start = entity_type, index
    return spans


def tags_from_spans(spans: Sequence[Span], length: int) -> list[str]:
    """Convert spans over words to IOB2 tags; of overlapping spans the first one counts."""
    tags = ["O"] * length
    for span in spans:
        if all(tag == "O" for tag in tags[span.start : span.end]):
            tags[span.start : span.end] = [f"B-{span.type}"] + [f"I-{span.type}"] * (span.end - span.start - 1)
    return tags
