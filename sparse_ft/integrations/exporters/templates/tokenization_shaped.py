"""A tokenizer that says how the word of each token is written.

Written by sparse-ft. ``word_shapes`` are indices in words.SHAPES, for the words of a text or of a list of words.
"""

from bisect import bisect_right

from transformers import PreTrainedTokenizerFast

from .words import split_words, word_shape

LANGUAGE = "en"
BY_WORDS = False
"""Whether texts are split into words before they become tokens."""


class ShapedTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, is_split_into_words=False, return_tensors=None, **options):
        if BY_WORDS and not is_split_into_words:
            text = _words(text) if isinstance(text, str) else [_words(row) for row in text]
            is_split_into_words = True
        encoded = super().__call__(text, is_split_into_words=is_split_into_words, **options)
        first = text[0] if len(text) else ""
        batched = isinstance(text, (list, tuple)) and not (is_split_into_words and isinstance(first, str))
        rows = text if batched else [text]
        sources = encoded.get("overflow_to_sample_mapping", range(len(rows)))
        read = _shapes_of_words if is_split_into_words else _shapes_in_text
        shapes = [read(rows[source], row) for source, row in zip(sources, encoded.encodings, strict=True)]
        nested = batched or "overflow_to_sample_mapping" in encoded
        encoded["word_shapes"] = shapes if nested else shapes[0]
        return encoded.convert_to_tensors(return_tensors, prepend_batch_axis=not nested)


def _words(text):
    return [word.text for word in split_words(text, LANGUAGE)]


def _shapes_of_words(words, row):
    return [0 if index is None else word_shape(words[index]) for index in row.word_ids]


def _shapes_in_text(text, row):
    words = split_words(text, LANGUAGE)
    starts = [word.start for word in words]
    return [
        0 if index is None or not words else word_shape(words[max(0, bisect_right(starts, begin) - 1)].text)
        for index, (begin, _) in zip(row.word_ids, row.offsets, strict=True)
    ]
