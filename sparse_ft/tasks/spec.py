"""Tasks: data, labels and metric, declared in one YAML file. Knows nothing of tensors."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, Strict, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sparse_ft.documents import read_yaml
from sparse_ft.errors import ConfigError, DataError, explain, unknown_name
from sparse_ft.paths import similar_path
from sparse_ft.resources import bundled_dir, bundled_names
from sparse_ft.sections import Flag, Section

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Column = str | int | list[str | int]
METRICS = {
    "classification": "accuracy",
    "multi_label": "micro_f1",
    "token_classification": "f1",
    "span_extraction": "exact_match",
    "multiple_choice": "accuracy",
}
"""Metric of a task that names none, by its kind."""


class HubSource(Section):
    """A data set that the ``datasets`` library loads: a hub id, or a local folder in hub layout."""

    path: str
    """Hub id, or path of a folder."""
    name: str | None = None
    """Configuration of the data set; null is its default."""
    revision: str | None = None
    """Commit, tag or branch on the hub; null is the main branch."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """Our split name to the hub's, where they differ. Without a validation split, a tenth of train is held out."""
    columns: dict[str, Column] | None = None
    """Our column to the hub's; null takes ``columns`` of the task."""
    labels: dict[str, str] | None = None
    """Label values on the hub to names; null takes ``labels`` of the task."""
    label_scheme: str | None = None
    """Tagging scheme on the hub; null takes ``label_scheme`` of the task."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _named_labels(value)


class FileSource(Section):
    """Local files as published. The ``.gz`` of a compressed file may be left out of its name."""

    format: Literal[
        "conll", "csv", "tsv", "jsonl", "json", "cluener", "cluewsc", "squad", "c3", "chid", "parquet", "lines"
    ]
    """Format of all files."""
    root: str | None = None
    """Folder of the files, relative to the task file; used without ``--data``."""
    separator: str | None = None
    """Column separator of ``conll``; null is any run of spaces and tabs."""
    header: Flag = True
    """Whether the first line of a ``csv`` or ``tsv`` names the columns."""
    train: str | list[str] | None = None
    """One file or several; ``file.json#key`` selects one key of a JSON object; a folder for ``lines``."""
    validation: str | list[str] | None = None
    """As ``train``; null holds out a tenth of train by a fixed seed."""
    test: str | list[str] | None = None
    """As ``train``."""
    unlabelled: list[Split] = Field(default_factory=list)
    """Splits whose labels the publisher hides."""


class Division(Section):
    """How rows without splits were divided; ``train`` writes it into the task files of a checkpoint."""

    rule: Literal["stratified", "random", "all", "own"]
    """The rule ``data.division`` of the run; own where the data has all its splits."""
    fold: Annotated[tuple[int, int], Strict(False)] | None = None
    """Number of the fold that is tested, from 1, and number of folds; null in runs without ``--folds``."""
    train: int = Field(default=0, ge=0)
    """Number of rows in train."""
    validation: int = Field(default=0, ge=0)
    """Number of rows that are held out for validation."""
    test: int = Field(default=0, ge=0)
    """Number of rows that are held out for test."""
    sha256: str = ""
    """Digest of the texts and labels of all divided rows, by which a copy of the file is known."""


UNRECORDED = Division(rule="random")
"""The division of checkpoints before version 0.2, which record none."""


class TaskSpec(Section):
    """A task as its YAML file declares it."""

    name: str
    """Name of the task and of its expert and head."""
    kind: str
    """classification, multi_label, token_classification, span_extraction or multiple_choice."""
    description: str = ""
    """One line for ``sparse-ft tasks``."""
    language: str = Field(default="en", pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")
    """Language tag of BCP 47, e.g. en, zh or pt-BR; decides how raw text is split into words."""
    hub: HubSource | None = None
    """Data set on the hub, used without ``--data`` unless the folder ``files.root`` exists."""
    files: FileSource | None = None
    """Data in files."""
    columns: dict[str, Column] = Field(default_factory=dict)
    """Our column (``text``, ``text_pair``, ``label``, ``labels``, ``tokens``, ``tags``, ``spans``, ``choices``,
    ``answer``, ``answers``) to the source's name or 0-based position, where they differ."""
    labels: list[str] | dict[str, str] | None = None
    """All label names in order, or source values mapped to names; null takes the names that occur in train, sorted. In
    tagging these are entity types, or integers mapped to tags, e.g. {0: O, 1: B-PER, 2: I-PER}."""
    drop_labels: list[str] = Field(default_factory=list)
    """Source labels whose rows are left out, e.g. ``-`` where annotators disagreed."""
    out_of_scope: str | None = None
    """The label that means "none of the others"."""
    label_scheme: str = "iob2"
    """Tagging scheme of the source: iob1, iob2 (bio), ioe1, ioe2, bios, bioes, bilou or bmes."""
    metric: str
    """Metric for early stopping and headlines, higher is better: a metric of the kind, or ``evaluate:<id>``. The
    default is accuracy, micro_f1 for multi_label, f1 for token_classification, exact_match for span_extraction."""
    leaks: dict[Split, list[int]] = Field(default_factory=dict)
    """0-based rows of an evaluation split whose text also occurs in train; scores are also given without them."""
    division: Division | None = None
    """How ``train`` divided the rows, in the task files of checkpoints; null divides by ``data.division``."""
    example: str = ""
    """One row, for ``sparse-ft tasks NAME``."""
    license: str = ""
    """License of the data."""
    source: str = ""
    """Publication or address of the data."""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """Fill in the metric of the kind, and number a list of tags, as integer tags count them."""
        if not isinstance(values, dict):
            return values
        labels, kind = values.get("labels"), str(values.get("kind"))
        if kind == "token_classification" and isinstance(labels, list) and _are_tags(labels):
            values = {**values, "labels": dict(enumerate(labels))}
        return {**values, "metric": values.get("metric") or METRICS.get(kind, "")}

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return _named_labels(value)

    @field_validator("drop_labels", "out_of_scope", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return _label_texts(value)

    _foreign: bool = PrivateAttr(default=False)

    @property
    def foreign(self) -> bool:
        """Whether a checkpoint brought the task, which may then name neither code nor data on the hub."""
        return self._foreign

    def marked(self, *, foreign: bool) -> "TaskSpec":
        """Return the task as one that a checkpoint brought, or as one that the user trusts."""
        copied = self.model_copy()
        copied._foreign = foreign
        return copied

    @property
    def reads(self) -> Literal["text", "pair", "choices"]:
        """What a row consists of: one text, a pair of texts, or choices beside one or two texts."""
        if self.kind == "multiple_choice":
            return "choices"
        return "pair" if "text_pair" in self.columns or self.kind == "span_extraction" else "text"

    @property
    def has_labels(self) -> bool:
        """Whether all rows have the same labels; otherwise every row has answers of its own."""
        return self.kind not in {"span_extraction", "multiple_choice"}

    @property
    def label_names(self) -> list[str] | None:
        """All label names in order (of tags, the entity types), or None while only the train split knows them."""
        if isinstance(self.labels, dict):
            names = [_type_of(name) if self.maps_tags else name for name in self.labels.values()]
            return [name for name in dict.fromkeys(names) if name]
        return self.labels

    @property
    def maps_tags(self) -> bool:
        """Whether ``labels`` maps source values to tags, such as 1 to B-PER, instead of entity types to names."""
        tagging = self.kind == "token_classification" and isinstance(self.labels, dict)
        return tagging and _are_tags(list(self.labels.values()))  # type: ignore[union-attr]

    def with_labels(self, names: Sequence[str]) -> "TaskSpec":
        """Return the task with these labels in this order; source values stay mapped to their names.

        Args:
            names: All labels of the head; for tags, the entity types.
        """
        labels: list[str] | dict[str, str] = list(names)
        if isinstance(self.labels, dict) and self.maps_tags and set(names) == set(self.label_names or []):
            tags = sorted(self.labels.items(), key=lambda item: ["", *names].index(_type_of(item[1])))
            return self.model_copy(update={"labels": dict(tags)})
        if isinstance(self.labels, dict) and not self.maps_tags:
            known = self.labels.items()
            sources = {name: [key for key, other in known if other == name] or [name] for name in names}
            labels = {source: name for name in names for source in sources[name]}
        return self.model_copy(update={"labels": labels})


def _are_tags(names: Sequence[Any]) -> bool:
    return len(names) > 1 and all(isinstance(name, str) and re.fullmatch(r"O|[A-Z]-.+", name) for name in names)


def _type_of(tag: str) -> str:
    return tag.partition("-")[2]


def _label_texts(value: Any) -> Any:
    """Write labels that YAML or Python holds as numbers or booleans as text."""
    if isinstance(value, list):
        return [_label_text(name) for name in value]
    return None if value is None else _label_text(value)


def _named_labels(value: Any) -> Any:
    """Check a list of labels, or a mapping of source values to names, and write both as text."""
    if value is None:
        return None
    if not isinstance(value, list | dict):
        raise _wrong("expected a list of names, or source values mapped to names")
    texts = [_label_text(name) for name in value]
    twice = next((name for index, name in enumerate(texts) if name in texts[:index]), None)
    if twice is not None:
        raise _wrong(f"{twice!r} is listed twice")
    return dict(zip(texts, map(_label_text, value.values()), strict=True)) if isinstance(value, dict) else texts


def _wrong(problem: str) -> PydanticCustomError:
    return PydanticCustomError("label", "{problem}", {"problem": problem})


def _label_text(value: Any) -> str:
    """Return the text of a label; refuse what is none, e.g. null, a list or an empty string."""
    if isinstance(value, bool):
        return str(value).lower()
    problem = f"{value!r} is no label; expected a name or a number"
    if value is None:
        problem = "null is no label; a label that is spelled so stands in quotes, as in 'null'"
    if not isinstance(value, str | int | float) or value == "" or value != value:
        raise _wrong(problem)
    return str(value)


def list_tasks() -> list[str]:
    """List the names of the bundled tasks, e.g. ``ner`` or ``clue/tnews``."""
    return [name for name in bundled_names("tasks") if not name.startswith("data/")]


def task_path(name_or_path: str | Path) -> Path:
    """Find a task file by the name of a bundled task, or by its path.

    Raises:
        ConfigError: If there is neither such a bundled task nor such a file.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            advice = similar_path(path) or " Give the path of a YAML file, or a bundled name."
            raise ConfigError(f"Task file {str(path)!r} does not exist.{advice}")
        return path
    if str(name_or_path) not in list_tasks():
        raise ConfigError(unknown_name("task", str(name_or_path), list_tasks()) + _name_advice(path))
    return bundled_dir("tasks") / f"{name_or_path}.yaml"


def _name_advice(path: Path) -> str:
    """Return how to name a task; a task file without its ending is a usual mistake."""
    with contextlib.suppress(OSError, ValueError):  # no file can have this name
        file = path.with_name(f"{path.name}.yaml")
        if file.is_file():
            return f" The path of a task file includes its ending: {str(file)!r}."
    return " See `sparse-ft tasks`, or give the path of a YAML file."


def load_task(name_or_path: str | Path) -> TaskSpec:
    """Load and check a task file.

    Args:
        name_or_path: A bundled name such as ``ner`` or ``clue/tnews``, or the path of a YAML file.

    Returns:
        The task, with ``files.root`` made absolute.

    Raises:
        ConfigError: If the name is unknown or the file is not a valid task; all problems in one message.
    """
    path = task_path(name_or_path)
    values = read_yaml(path, f"Task file {str(path)!r}", written=True)
    return parse_task(values, where=str(path), root=path.parent)


def check_has_data(spec: TaskSpec) -> None:
    """Refuse a task whose data only ``--data`` can name.

    Raises:
        DataError: If its task file names neither a folder nor a data set on the hub.
    """
    if spec.hub is None and (spec.files is None or spec.files.root is None):
        raise DataError(
            f"Task {spec.name!r} comes without data. Name the folder that holds its files, or one file, with --data."
        )


def parse_task(values: Any, *, where: str, root: Path | None = None) -> TaskSpec:
    """Check the content of a task file.

    Args:
        values: The parsed YAML or JSON; anything but a mapping is refused.
        where: The file, for messages.
        root: Folder that a relative ``files.root`` starts from.

    Raises:
        ConfigError: With the field path of every problem.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"Task file {where!r} must hold a mapping of keys, not {type(values).__name__}.")
    try:
        spec = TaskSpec.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"Task file {where!r}: {explain(error, TaskSpec)}") from error
    if root is not None and spec.files is not None and spec.files.root is not None:
        absolute = str((root / spec.files.root).resolve())
        spec = spec.model_copy(update={"files": spec.files.model_copy(update={"root": absolute})})
    return spec
