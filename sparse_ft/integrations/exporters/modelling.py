"""The code that an export to transformers brings where no class of transformers computes what the checkpoint does.

A task on texts needs a model that pools before its head; an expert that sees word shapes needs a model that adds their
vectors, and a tokenizer that tells how each word is written. transformers runs such files with
``trust_remote_code=True``. The files are written from ``templates/``, which hold the code for BERT.
"""

import importlib
import inspect
import json
import sys
import types
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparse_ft.backbone import words
from sparse_ft.backbone.pooling import EPSILON
from sparse_ft.checkpoint.folders import write_bytes, write_json
from sparse_ft.integrations.exporters.parts import TokenClassifier


def write_pooled(folder: Path, *, stock: TokenClassifier, pooling: str) -> None:
    """Make an exported token classifier one of texts.

    Args:
        folder: Folder of the export; its config then names the class ``PooledForSequenceClassification``.
        stock: The token classifier.
        pooling: ``unit``, ``mean``, ``first`` or ``last``.
    """
    constants = {"POOLING": repr(pooling), "HEAD": repr(stock.head), "EPSILON": repr(EPSILON)}
    _write_model(folder, "pooled", "SequenceClassification", stock=stock.model, constants=constants)


def write_shaped(folder: Path, *, stock: Any, block: str, width: int, language: str, by_words: bool = False) -> None:
    """Make an exported token classifier and its tokenizer see word shapes.

    Args:
        folder: Folder of the export; its config then names the class ``ShapedForTokenClassification``.
        stock: The token classifier.
        block: Name of the module in it before which the vectors are added.
        width: Width of the vectors.
        language: Language of the task, which decides how texts are split into words.
        by_words: Whether texts are split into words before they become tokens.
    """
    constants = {"BLOCK": repr(block), "SHAPES, WIDTH": f"{len(words.SHAPES)}, {width}"}
    _write_model(folder, "shaped", "TokenClassification", stock=stock, constants=constants)
    named = {"LANGUAGE": repr(language), "BY_WORDS": repr(by_words)}
    tokenizer = _with_constants(read_template("tokenization_shaped.py"), named)
    write_bytes(folder / "tokenization_shaped.py", tokenizer.encode())
    write_words(folder)
    classes = {"AutoTokenizer": [None, "tokenization_shaped.ShapedTokenizer"]}
    _update(folder / "tokenizer_config.json", {"tokenizer_class": "ShapedTokenizer", "auto_map": classes})


def write_multitask(
    folder: Path,
    *,
    stock: TokenClassifier,
    tasks: Mapping[str, tuple[str, int, int]],
    pooling: str,
    block: str,
    width: int,
    language: str,
    by_words: bool,
) -> None:
    """Make an exported token classifier answer several tasks.

    Args:
        folder: Folder of the export; its config then names the class ``MultitaskForTasks``.
        stock: The token classifier, with the heads of all tasks one below the other.
        tasks: Task to ``text`` or ``word``, and to the first row of its head and the one after its last.
        pooling: ``unit``, ``mean``, ``first`` or ``last``.
        block: Name of the module before which the vectors of word shapes are added.
        width: Width of the vectors.
        language: Language of the tasks, which decides how texts are split into words.
        by_words: Whether texts are split into words before they become tokens.
    """
    write_pooled(folder, stock=stock, pooling=pooling)
    write_shaped(folder, stock=stock.model, block=block, width=width, language=language, by_words=by_words)
    _write_model(
        folder, "multitask", "Tasks", stock=stock.model, constants={"TASKS": repr(dict(tasks))}, auto="AutoModel"
    )


def write_words(folder: Path) -> None:
    """Write the module that tells how a word is written; it needs nothing but Python."""
    write_bytes(folder / "words.py", inspect.getsource(words).encode())


def read_template(name: str) -> str:
    """Return a file of ``templates/``."""
    return files("sparse_ft.integrations.exporters").joinpath("templates", name).read_text(encoding="utf-8")


def exported_class(folder: Path, module: str, name: str) -> Any:
    """Import a class of an export from its folder; transformers would import a copy in its cache.

    Args:
        folder: Folder of the export.
        module: The file, without its suffix.
        name: Name of the class.
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


def _write_model(
    folder: Path, prefix: str, end: str, *, stock: Any, constants: Mapping[str, str], auto: str | None = None
) -> None:
    """Write ``modeling_<prefix>.py`` with the class ``<Prefix>For<end>``, and name it in config.json."""
    module, title, model_type = f"modeling_{prefix}", prefix.title(), f"{prefix}_{stock.config.model_type}"
    source = _with_constants(read_template(f"{module}.py"), constants)
    source = source.replace("BertForTokenClassification", type(stock).__name__)
    source = source.replace("BertConfig", type(stock.config).__name__).replace(f"{prefix}_bert", model_type)
    write_bytes(folder / f"{module}.py", source.encode())
    name = f"{title}For{end}"
    classes = {"AutoConfig": f"{module}.{title}Config", auto or f"AutoModelFor{end}": f"{module}.{name}"}
    _update(folder / "config.json", {"model_type": model_type, "architectures": [name], "auto_map": classes})


def _with_constants(source: str, constants: Mapping[str, str]) -> str:
    """Give the constants at the top of a template other values."""
    for name, value in constants.items():
        before = next(line for line in source.splitlines() if line.startswith(f"{name} = "))
        source = source.replace(before, f"{name} = {value}", 1)
    return source


def _update(file: Path, values: Mapping[str, Any]) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **values})
