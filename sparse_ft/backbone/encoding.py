"""Encode texts as token ids: single texts, pairs, and windows over words."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sparse_ft.backbone.backbone import Backbone
from sparse_ft.backbone.words import SHAPES, split_words, word_shape

_NO_WORD = SHAPES.index("none")
_MAX_KNOWN = 1024
"""Most texts of the last call whose encoding is kept for the next one: the tasks of a call read the same texts."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of model input; a text gives several examples if it is read in windows or has choices."""

    row: int
    """Index of the text in the encoded list."""
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    word_positions: list[int] = field(default_factory=list)
    """Positions of the tokens whose hidden states are classified; empty if the pooled text is classified."""
    word_indices: list[int] = field(default_factory=list)
    """Index in the text of the word at each of the ``word_positions``; in multiple choice, the index of the choice."""
    word_shapes: list[int] = field(default_factory=list)
    """Shape of the word of each token, an index in ``words.SHAPES``; empty if the text is not given as words."""
    targets: list[Any] = field(default_factory=list)
    """Class indices (one, or one per word; -100 is ignored), or 0/1 per label. Empty in prediction."""
    trunk: Tensor | None = None
    """Cached hidden states (tokens, hidden) that enter the lowest block with experts; see trunk.py."""
    means: Tensor | None = None
    """Cached means over the tokens of the states that enter each block up to the gate's, (blocks, hidden) float32."""


class Encoder:
    """Turns texts and words into examples for one backbone.

    Args:
        backbone: Gives the tokenizer.
        max_length: Most tokens of a row, special tokens included; lowered to the limit of the backbone.
        by_words: Whether single texts are split into words, too, so that tasks on texts and tasks on words read the
            same tokens and word shapes.
    """

    def __init__(self, backbone: Backbone, *, max_length: int, by_words: bool = False) -> None:
        self.tokenizer = backbone.tokenizer
        self.by_words = by_words
        self._known: dict[tuple[str, ...], list[Example]] = {}
        self.max_length = min(max_length, backbone.max_length)
        self.empty_id = backbone.pad_id
        # In a causal model only the last piece of a word sees all of the word.
        self.last_piece = backbone.family.causal
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = probe["input_ids"], probe["special_tokens_mask"]
        first = special.index(0) if 0 in special else 0
        last = len(special) - special[::-1].index(0) if 0 in special else 0
        self.prefix, self.suffix = ids[:first], ids[last:]
        pair = self.tokenizer("a", "a", return_special_tokens_mask=True)
        marks = "".join(map(str, pair["special_tokens_mask"])).strip("1")  # of BERT: 0 1 0
        start = pair["special_tokens_mask"].index(0) + marks.find("1") if "1" in marks else 0
        self.between = pair["input_ids"][start : start + marks.count("1")]
        """Special tokens between the two texts of a pair; before and after the pair stand those of a text."""
        # Some tokenizers give token types to models that have none; GPT-2 would add word embeddings for them.
        self.has_types = "token_type_ids" in probe and getattr(backbone.config, "type_vocab_size", 0) > 1

    def texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, language: str = "en") -> list[Example]:
        """Encode one example per text or pair; tokens above ``max_length`` are cut, from the longer text of a pair.

        Args:
            texts: Any texts, also empty ones.
            pairs: As many second texts.
            language: Language tag, by which single texts are split if the encoder reads them ``by_words``.
        """
        if not texts:
            return []
        if self.by_words and pairs is None:
            windows = self.words([[word.text for word in split_words(text, language)] for text in texts])
            first = {window.row: window for window in reversed(windows)}
            return [replace(first[row], word_positions=[], word_indices=[]) for row in range(len(texts))]
        arguments = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        encoded = self.tokenizer(*arguments, truncation=True, max_length=self.max_length)
        types = encoded["token_type_ids"] if pairs is not None and self.has_types else [None] * len(texts)
        return [
            Example(row, ids or [self.empty_id], token_type_ids=type_ids or None)
            for row, (ids, type_ids) in enumerate(zip(encoded["input_ids"], types, strict=True))
        ]

    def words(self, rows: Sequence[Sequence[str]], *, questions: Sequence[str] | None = None) -> list[Example]:
        """Encode lists of words; a row that exceeds ``max_length`` becomes overlapping windows.

        Every word belongs to exactly one window, the one that shows most of its context. A word that the tokenizer
        drops (a private character, say) belongs to none.

        Args:
            rows: Words of each text; a text may have none.
            questions: As many texts. Each stands before its row as the first of a pair, in all windows of the row, and
                takes at most half of ``max_length``.
        """
        if questions is not None:
            return self._encode_words(rows, self._befores(questions))
        keys = [tuple(words) for words in rows]
        last = self._known  # another thread may replace it
        known = {key: last[key] for key in keys if key in last}
        new = [key for key in dict.fromkeys(keys) if key not in known]
        encoded: dict[int, list[Example]] = {}
        for example in self._encode_words(new, [self.prefix] * len(new)):
            encoded.setdefault(example.row, []).append(example)
        known |= {key: encoded[index] for index, key in enumerate(new)}
        self._known = dict(itertools.islice(known.items(), _MAX_KNOWN))
        return [replace(example, row=row) for row, key in enumerate(keys) for example in known[key]]

    def _encode_words(self, rows: Sequence[Sequence[str]], befores: Sequence[list[int]]) -> list[Example]:
        """Encode lists of words, each behind the special tokens or the question in ``befores``."""
        filled = [row for row, words in enumerate(rows) if len(words)]
        examples = [self._window(row, [], befores[row]) for row, words in enumerate(rows) if not len(words)]
        if filled:
            encoded = self.tokenizer(
                [list(rows[row]) for row in filled], is_split_into_words=True, add_special_tokens=False
            )
            for index, row in enumerate(filled):
                shapes = [word_shape(word) for word in rows[row]]
                ids, word_ids = encoded["input_ids"][index], encoded.word_ids(index)
                examples.extend(self._windows(row, ids, word_ids, shapes, before=befores[row]))
        return sorted(examples, key=_row_of)

    def around(self, text: str, position: int, *, tokens: int) -> str:
        """Cut a text to a number of tokens, evenly on both sides of a character as far as the text allows.

        Args:
            text: Any text.
            position: Index of the character, which is never cut off.
            tokens: Most tokens, at least 1.
        """
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        middle = next((token for token, (_, end) in enumerate(spans) if end > position), len(spans) - 1)
        cut = text
        for room in range(min(tokens, len(spans)), 0, -1):  # byte-level: half a character at an edge is encoded whole
            first = min(max(0, middle - room // 2), len(spans) - room)
            cut = text[spans[first][0] : spans[first + room - 1][1]] if room < len(spans) else text
            if len(self.tokenizer(cut, add_special_tokens=False)["input_ids"]) <= tokens:
                break
        return cut

    def _befores(self, questions: Sequence[str]) -> list[list[int]]:
        """Encode the question, with special tokens, that stands before the windows of each row."""
        room = self.max_length // 2 - len(self.prefix) - len(self.between)
        encoded = self.tokenizer(list(questions), add_special_tokens=False)["input_ids"] if questions else []
        return [[*self.prefix, *ids[: max(0, room)], *self.between] for ids in encoded]

    def _window(self, row: int, ids: Sequence[int], before: list[int]) -> Example:
        """Put special tokens, and the question if there is one, around a part of a row."""
        paired = self.has_types and before is not self.prefix
        types = [0] * len(before) + [1] * (len(ids) + len(self.suffix)) if paired else None
        return Example(row, [*before, *ids, *self.suffix] or [self.empty_id], token_type_ids=types)

    def _windows(
        self, row: int, ids: list[int], word_ids: list[int], shapes: list[int], *, before: list[int]
    ) -> list[Example]:
        """Cut a row of tokens into windows, and assign each word to the window that shows most of its context."""
        marks: dict[int, int] = {}  # word -> position of the piece that represents it
        for position, word in enumerate(word_ids):
            if self.last_piece or word not in marks:
                marks[word] = position
        capacity = self.max_length - len(before) - len(self.suffix)
        members: dict[int, list[int]] = {}  # start of window -> its words
        starts = _window_starts(len(ids), capacity)
        for word, position in marks.items():
            showing = [start for start in starts if start <= position < start + capacity]
            best = max(showing, key=lambda start: min(position - start, start + capacity - 1 - position))
            members.setdefault(best, []).append(word)
        return [
            replace(
                self._window(row, ids[start : start + capacity], before),
                word_positions=[len(before) + marks[word] - start for word in members.get(start, [])],
                word_indices=members.get(start, []),
                word_shapes=[
                    *(_NO_WORD for _ in before),
                    *(shapes[word] for word in word_ids[start : start + capacity]),
                    *(_NO_WORD for _ in self.suffix),
                ]
                or [_NO_WORD],
            )
            for start in starts
        ]


def _row_of(example: Example) -> int:
    return example.row


def _window_starts(length: int, capacity: int) -> list[int]:
    """Return the starts of windows that overlap by a quarter of ``capacity`` or more; the last ends with the row."""
    if length <= capacity:
        return [0]
    stride = max(1, capacity - capacity // 4)
    starts = list(range(0, length - capacity, stride))
    return [*starts, length - capacity]


NO_TOKEN_LOGIT = -1e4
"""Logit of all outputs except the first for a word without a token: it begins no entity and ends no span."""

PROBE_TEXTS = (
    "", " ", "!", "a", "🙂", "Great 👍🏽 – déjà vu?! 😀😀", "I love it\tbut\nnot twice.", "上海的天气很好。",
    "NATO and the U.S. met in Geneva on 1996-08-22 at 7.30 p.m.", "word " * 40,
    "https://example.org/?q=1&r=2 @you #tag",
)  # fmt: skip
"""Unusual texts, on which two tokenizers or models are compared."""
