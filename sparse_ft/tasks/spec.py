"""What a task is: data, labels and metric, declared in one YAML file. Knows nothing of tensors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_ft.errors import ConfigError, explain, unknown_name
from sparse_ft.resources import bundled_dir, bundled_names

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Column = str | int | list[str | int]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubSource(_Section):
    """A data set that the ``datasets`` library loads: a hub id, or a local folder in hub layout."""

    path: str
    """Hub id or folder."""
    name: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    splits: dict[Split, str] = Field(default_factory=dict)
    """Our split name to the hub's, where they differ; ``validation`` may be missing on the hub."""
    columns: dict[str, Column] | None = None
    """Columns on the hub, where they differ from the task's ``columns``."""
    labels: dict[str, str] | None = None
    """Label values on the hub to names, where they differ from the task's ``labels``."""
    label_scheme: str | None = None


class FileSource(_Section):
    """Local files, as published. A name may be that of the file without ``.gz``."""

    format: Literal[
        "conll", "csv", "tsv", "jsonl", "json", "cluener", "cluewsc", "squad", "c3", "chid", "parquet", "lines"
    ]
    root: str | None = None
    """Folder of the files, relative to the task file; used when no ``--data`` is given."""
    separator: str | None = None
    """Column separator of ``conll`` (default: any white space)."""
    header: bool = True
    """Whether the first line of a ``csv`` or ``tsv`` names the columns."""
    train: str | list[str] | None = None
    """File, or several; ``file.json#key`` takes one key of a JSON object; a folder for ``lines``."""
    validation: str | list[str] | None = None
    """Missing: one tenth of train is cut off by a fixed seed."""
    test: str | list[str] | None = None
    unlabelled: list[Split] = Field(default_factory=list)
    """Splits whose labels are hidden by the publisher."""


def _all_different(names: list[str]) -> list[str]:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands there twice")
    return names


class TaskSpec(_Section):
    """A task as its YAML file declares it."""

    name: str
    kind: str
    description: str = ""
    language: str = Field(default="en", pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")
    """As in BCP 47, e.g. en, zh or pt-BR."""
    hub: HubSource | None = None
    files: FileSource | None = None
    columns: dict[str, Column] = Field(default_factory=dict)
    """Our column (``text``, ``text_pair``, ``label``, ``labels``, ``tokens``, ``tags``, ``spans``, ``choices``,
    ``answer``, ``answers``) to the source's."""
    labels: Annotated[list[str], AfterValidator(_all_different)] | dict[str, str] | None = None
    """All label names in order, or source values mapped to names. None: the names found in train, sorted."""
    drop_labels: list[str] = Field(default_factory=list)
    """Rows with these source labels are left out, e.g. ``-`` where annotators disagreed."""
    out_of_scope: str | None = None
    """The label that means "none of the others"."""
    label_scheme: str = "iob2"
    """How tags are written in the source: iob1, iob2, bioes, bmes."""
    metric: str
    """Name in METRICS, or ``evaluate:<id>``; decides early stopping and the headline. Higher is better."""
    leaks: dict[Split, list[int]] = Field(default_factory=dict)
    """0-based rows of an evaluation split whose text also occurs in train."""
    example: str = ""
    license: str = ""
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _text_labels(cls, values: Any) -> Any:
        """Read YAML's numbers and booleans used as labels as the text that stands in the file."""
        if isinstance(values, dict):
            labels = values.get("labels")
            if isinstance(labels, dict):
                values = {**values, "labels": {_as_text(key): _as_text(name) for key, name in labels.items()}}
            elif isinstance(labels, list):
                values = {**values, "labels": [_as_text(name) for name in labels]}
            if isinstance(values.get("drop_labels"), list):
                values = {**values, "drop_labels": [_as_text(name) for name in values["drop_labels"]]}
            if isinstance(values.get("out_of_scope"), int):
                values = {**values, "out_of_scope": _as_text(values["out_of_scope"])}
        return values

    @property
    def reads(self) -> Literal["text", "pair", "choices"]:
        """What a row asks: about one text, about two, or to choose among choices beside one or two texts."""
        if self.kind == "multiple_choice":
            return "choices"
        return "pair" if "text_pair" in self.columns or self.kind == "span_extraction" else "text"

    @property
    def has_labels(self) -> bool:
        """Whether all rows have the same labels to choose from; else the answers are each row's own."""
        return self.kind not in {"span_extraction", "multiple_choice"}

    @property
    def label_names(self) -> list[str] | None:
        """All label names in order, or None while only the train split knows them."""
        if isinstance(self.labels, dict):
            return list(dict.fromkeys(self.labels.values()))
        return self.labels

    def with_labels(self, names: Sequence[str]) -> "TaskSpec":
        """Return the task with these labels in this order; what a mapping says of the source stays.

        Args:
            names: All that a head decides between; for tags, the entity types.
        """
        labels: list[str] | dict[str, str] = list(names)
        if isinstance(self.labels, dict):
            known = self.labels.items()
            sources = {name: [key for key, other in known if other == name] or [name] for name in names}
            labels = {source: name for name in names for source in sources[name]}
        return self.model_copy(update={"labels": labels})


class _Loader(yaml.SafeLoader):
    """Takes yes, no, on and off for words, as YAML 1.2 does: they are labels of many a task."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def list_tasks() -> list[str]:
    """List the names of the bundled tasks, e.g. ``ner`` or ``clue/tnews``."""
    return [name for name in bundled_names("tasks") if not name.startswith("data/")]


def task_path(name_or_path: str | Path) -> Path:
    """Find the YAML file of a bundled task name, or of a path to one.

    Raises:
        ConfigError: If there is neither such a bundled task nor such a file.
    """
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"}:
        if not given.is_file():
            advice = "Give the path of a YAML file, or a bundled name."
            raise ConfigError(f"Task file {str(given)!r} does not exist. {advice}")
        return given
    if str(name_or_path) not in list_tasks():
        advice = " See `sparse-ft tasks`, or give the path of a YAML file."
        raise ConfigError(unknown_name("task", str(name_or_path), list_tasks()) + advice)
    return bundled_dir("tasks") / f"{name_or_path}.yaml"


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
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"Task file {str(path)!r} is not readable YAML: {' '.join(str(error).split())}") from error
    return parse_task(values, where=str(path), root=path.parent)


def parse_task(values: Any, *, where: str, root: Path | None = None) -> TaskSpec:
    """Check the content of a task file.

    Args:
        values: What YAML or JSON gave; a mapping if all is well.
        where: The file, for messages.
        root: Folder that a relative ``files.root`` refers to.

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
