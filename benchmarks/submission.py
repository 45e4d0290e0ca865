"""Answers to the hidden test splits of CLUE, in the files that its site accepts.

Names and shapes of the files, with the test splits of CLUE 1.1, are those of ``classification/run_clue_classifier.py``
and ``mrc/`` in https://github.com/CLUEbenchmark/CLUE/tree/9d232934e74c3ddd1f7b25d8e9711900aef5b8fe/baselines/paddlenlp
and for CLUENER, whose name is that of the sample file beside its data, of
https://github.com/CLUEbenchmark/CLUENER2020/blob/590cd5e2263aa0999ce177e06c82e69b4196553f/pytorch_version/run_ner_crf.py
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_ft.checkpoint.folders import explain_os_errors, write_bytes
from sparse_ft.errors import ConfigError, DataError, unknown_name
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.formats import read_file
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.records import FileOptions
from sparse_ft.tasks.spec import TaskSpec


class Submission(NamedTuple):
    """What the site wants of one task."""

    file: str
    """Name of the file to hand in."""
    test: str
    """Name of the file with the hidden test split, as CLUE ships it."""
    write: Callable[[Sequence[Any], Sequence[Any]], str]
    """Ids and answers to the content of the file."""


def _lines(ids: Sequence[Any], answers: Sequence[Any]) -> str:
    rows = ({"id": own, "label": answer} for own, answer in zip(ids, answers, strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _object(ids: Sequence[Any], answers: Sequence[Any]) -> str:
    return json.dumps(dict(zip(ids, answers, strict=True)), ensure_ascii=False, indent=2) + "\n"


SUBMISSIONS: dict[str, Submission] = {
    "afqmc": Submission("afqmc_predict.json", "test.json", _lines),
    "tnews": Submission("tnews11_predict.json", "test.json", _lines),
    "iflytek": Submission("iflytek_predict.json", "test.json", _lines),
    "cmnli": Submission("cmnli_predict.json", "test.json", _lines),
    "ocnli": Submission("ocnli_50k_predict.json", "test.json", _lines),
    "cluewsc": Submission("cluewsc11_predict.json", "test.json", _lines),
    "csl": Submission("csl_predict.json", "test.json", _lines),
    "cluener": Submission("cluener_predict.json", "test.json", _lines),
    "cmrc2018": Submission("cmrc2018_predict.json", "test.json", _object),
    "chid": Submission("chid11_predict.json", "test1.1.json", _object),
    "c3": Submission("c311_predict.json", "test1.1.json", _lines),
}


def write_submission(model: LoadedModel, task: str, *, data: str | Path, output: str | Path) -> Path:
    """Answer the hidden test split of a CLUE task and write the file to hand in.

    Args:
        model: Has the task.
        task: A key of SUBMISSIONS.
        data: Folder with the test split, as CLUE ships it.
        output: Folder to write into; made if missing.

    Returns:
        The file, with one answer for each row of the test split, in its order.

    Raises:
        ConfigError: If the site takes no such task.
        DataError: If the test split is not there, or its rows and ids do not fit together.
    """
    if task not in SUBMISSIONS:
        raise ConfigError(unknown_name("task to hand in", task, SUBMISSIONS))
    wanted, spec = SUBMISSIONS[task], model.tasks[task]
    ids = _ids(spec, Path(data), wanted.test)
    texts = _texts(spec, Path(data), wanted.test)
    if len(texts) != len(ids):
        raise DataError(
            f"{str(Path(data) / wanted.test)!r} has {len(ids)} rows, but {len(texts)} of them can be answered. The "
            "site wants an answer to each; check that the file is whole."
        )
    codes = {name: code for code, name in spec.labels.items()} if isinstance(spec.labels, dict) else {}
    answers = [_site_answer(dict(results.tasks[task]), codes) for results in model.predict(texts, [task])]
    path = Path(output) / wanted.file
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, wanted.write(ids, answers).encode("utf-8"))
    return path


def _ids(spec: TaskSpec, folder: Path, test: str) -> list[Any]:
    """Return the id of each row of a test split, in order: its own, else its place."""
    assert spec.files is not None
    records = read_file(folder, test, format=spec.files.format, options=FileOptions(spec.columns))
    values = [record.values if isinstance(record.values, dict) else {} for record in records]
    ids = [row.get("id", index) for index, row in enumerate(values)]
    twice = next((own for own, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"Two rows of {str(folder / test)!r} have the id {twice!r}. The site tells rows by it.")
    return ids


def _texts(spec: TaskSpec, folder: Path, test: str) -> list[Any]:
    """Return what ``LoadedModel.predict`` takes for each row of a test split, in order."""
    assert spec.files is not None
    hidden = spec.files.model_copy(update={"test": test, "unlabelled": ["test"]})
    rows = read(spec.model_copy(update={"files": hidden, "drop_labels": []}), data=folder, splits=["test"])["test"]
    if spec.reads == "text":
        return list(rows["text"])
    pairs = rows["text_pair"] if "text_pair" in rows.column_names else [None] * len(rows)
    if spec.reads == "pair":
        return list(zip(rows["text"], pairs, strict=True))
    return list(zip(rows["text"], pairs, rows["choices"], strict=True))


def _site_answer(answer: dict[str, Any], codes: dict[str, str]) -> Any:
    """Turn an answer of ``predict`` into what the site reads: a code, the place of a choice, a text, or entities."""
    if "choice" in answer:
        return answer["choice"]
    if "label" in answer:
        return codes.get(answer["label"], answer["label"])
    if "answer" in answer:
        return answer["answer"]
    entities: dict[str, dict[str, list[list[int]]]] = {}
    for entity in answer["entities"]:  # the ends of CLUENER are inclusive
        indices = entities.setdefault(entity["type"], {}).setdefault(entity["text"], [])
        indices.append([entity["start"], entity["end"] - 1])
    return entities
