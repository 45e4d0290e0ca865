"""The code that an export to transformers brings where no class of transformers computes what the checkpoint does.

A task on texts needs a model that pools before its head; an expert that sees word shapes one that adds their
vectors, and a tokenizer that says how each word is written. transformers runs such files with
``trust_remote_code=True``.
"""

import importlib
import inspect
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sparse_ft.backbone.words
from sparse_ft.backbone.pooling import EPSILON
from sparse_ft.checkpoint.folders import write_bytes, write_json
from sparse_ft.integrations.exporters.parts import TokenClassifier

_MEAN = "(tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)"
_POOLED = {
    "unit": f"{_MEAN}\n        text = text * (text.square().mean(-1, keepdim=True) + {EPSILON}).rsqrt()",
    "mean": _MEAN,
    "first": "tokens[:, 0]",
    "last": "tokens[torch.arange(len(mask), device=mask.device), (mask.cumsum(1) * mask).argmax(1)]",
}
_POOLED_WORDS = {
    "unit": "the mean of its tokens, scaled to one length",
    "mean": "the mean of its tokens",
    "first": "its first token",
    "last": "its last token",
}

_MODEL = '''"""{about}
"""

import torch
from transformers import {config}, {stock}
{imports}

class {title}Config({config}):
    # A type of its own, so that no stock class takes these weights for its own.
    model_type = "{model_type}"


class {name}({stock}):
    config_class = {title}Config

    def __init__(self, config):
        super().__init__({config}.from_dict(config.to_dict()))  # the type by which the library builds the backbone
        self.config = config
{body}'''

_POOLED_ABOUT = """{stock} with one answer a text, which its head reads off {words}.

Written by sparse-ft."""

_POOLED_BODY = """
    def forward(self, input_ids, attention_mask=None, **inputs):
        tokens = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
        mask = torch.ones_like(tokens[..., 0]) if attention_mask is None else attention_mask.to(tokens.dtype)
        text = {pooled}
        return SequenceClassifierOutput(logits=self.{head}(text.to(self.{head}.weight.dtype)))
"""

_SHAPED_ABOUT = """{stock} that sees how words are written: a vector for each shape is added where a block begins.

Written by sparse-ft. The shapes come from the tokenizer of this folder."""

_SHAPED_BODY = """\
        self.word_shapes = torch.nn.Embedding({shapes}, {width})  # row 0, of what is no word, is zero
        self.get_submodule("{block}").register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, block, arguments, named):
        if arguments:
            return (arguments[0] + self.added, *arguments[1:]), named
        return arguments, {{**named, "hidden_states": named["hidden_states"] + self.added}}

    def forward(self, input_ids, attention_mask=None, word_shapes=None, **inputs):
        if word_shapes is None:
            raise ValueError("word_shapes is missing. Load the tokenizer of this folder with trust_remote_code=True.")
        self.added = self.word_shapes(word_shapes)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
"""

_SHAPED_TOKENIZER = '''"""A tokenizer that says how the word of each token is written.

Written by sparse-ft. ``word_shapes`` are places in words.SHAPES; those of the list of words, or of the words in a text.
"""

from bisect import bisect_right

from transformers import PreTrainedTokenizerFast

from .words import split_words, word_shape


class ShapedTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, is_split_into_words=False, return_tensors=None, **options):
        encoded = super().__call__(text, is_split_into_words=is_split_into_words, **options)
        first = text[0] if len(text) else ""
        batched = isinstance(text, (list, tuple)) and not (is_split_into_words and isinstance(first, str))
        rows = text if batched else [text]
        sources = encoded.get("overflow_to_sample_mapping", range(len(rows)))
        read = _shapes_of_words if is_split_into_words else _shapes_in_text
        shapes = [read(rows[source], row) for source, row in zip(sources, encoded.encodings)]
        nested = batched or "overflow_to_sample_mapping" in encoded
        encoded["word_shapes"] = shapes if nested else shapes[0]
        return encoded.convert_to_tensors(return_tensors, prepend_batch_axis=not nested)


def _shapes_of_words(words, row):
    return [0 if place is None else word_shape(words[place]) for place in row.word_ids]


def _shapes_in_text(text, row):
    words = split_words(text, {language})
    starts = [word.start for word in words]
    return [
        0 if place is None or not words else word_shape(words[max(0, bisect_right(starts, begin) - 1)].text)
        for place, (begin, _) in zip(row.word_ids, row.offsets)
    ]
'''


def write_pooled(folder: Path, *, stock: TokenClassifier, pooling: str) -> None:
    """Make an exported token classifier one of texts.

    Args:
        folder: Of the export; its config then names the class ``PooledForSequenceClassification``.
        stock: The token classifier.
        pooling: ``unit``, ``mean``, ``first`` or ``last``.
    """
    about = _POOLED_ABOUT.format(stock=type(stock.model).__name__, words=_POOLED_WORDS[pooling])
    imports = "from transformers.modeling_outputs import SequenceClassifierOutput\n"
    body = _POOLED_BODY.format(pooled=_POOLED[pooling], head=stock.head)
    _write_model(folder, "pooled", "SequenceClassification", stock=stock.model, about=about, imports=imports, body=body)


def write_shaped(folder: Path, *, stock: Any, block: str, width: int, language: str) -> None:
    """Make an exported token classifier and its tokenizer see word shapes.

    Args:
        folder: Of the export; its config then names the class ``ShapedForTokenClassification``.
        stock: The token classifier.
        block: Name of the module in it where the vectors are added.
        width: Of the vectors.
        language: Of the task; how its texts are split into words.
    """
    about = _SHAPED_ABOUT.format(stock=type(stock).__name__)
    body = _SHAPED_BODY.format(block=block, shapes=len(sparse_ft.words.SHAPES), width=width)
    _write_model(folder, "shaped", "TokenClassification", stock=stock, about=about, imports="", body=body)
    tokenizer = _SHAPED_TOKENIZER.format(language=repr(language))
    write_bytes(folder / "tokenization_shaped.py", tokenizer.encode())
    write_words(folder)
    named = {
        "tokenizer_class": "ShapedTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_shaped.ShapedTokenizer"]},
    }
    _update(folder / "tokenizer_config.json", named)


def write_words(folder: Path) -> None:
    """Write what tells how a word is written; it needs nothing but Python."""
    write_bytes(folder / "words.py", inspect.getsource(sparse_ft.words).encode())


def own_class(folder: Path, module: str, name: str) -> Any:
    """Import a class of an export from where it stands; transformers would keep a copy in its cache.

    Args:
        folder: Of the export.
        module: The file, without its suffix.
        name: Of the class.
    """
    package = types.ModuleType(f"sparse_ft_export_{abs(hash(folder))}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
    finally:
        sys.dont_write_bytecode = writes
        for loaded in [key for key in sys.modules if key.partition(".")[0] == package.__name__]:
            del sys.modules[loaded]


def _write_model(folder: Path, prefix: str, end: str, *, stock: Any, about: str, imports: str, body: str) -> None:
    """Write ``modeling_<prefix>.py`` with the class ``<Prefix>For<end>``, and let config.json name it."""
    module, title, config = f"modeling_{prefix}", prefix.title(), type(stock.config).__name__
    name, model_type = f"{title}For{end}", f"{prefix}_{stock.config.model_type}"
    source = _MODEL.format(
        about=about, imports=imports, body=body, title=title, name=name, model_type=model_type,
        config=config, stock=type(stock).__name__,
    )  # fmt: skip
    write_bytes(folder / f"{module}.py", source.encode())
    classes = {"AutoConfig": f"{module}.{title}Config", f"AutoModelFor{end}": f"{module}.{name}"}
    _update(folder / "config.json", {"model_type": model_type, "architectures": [name], "auto_map": classes})


def _update(file: Path, values: Mapping[str, Any]) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **values})
