"""A scikit-learn classifier of texts: an expert and its head, trained by ``fit``."""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset, DatasetDict
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from sparse_ft.checkpoint.checkpoint import Checkpoint, save_checkpoint
from sparse_ft.checkpoint.folders import replace_folder, write_bytes
from sparse_ft.checkpoint.outputs import claimed_output
from sparse_ft.config import changed_config
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.spec import Column, TaskSpec
from sparse_ft.training.train import train

TASK = "classifier"
"""Name of the one task, and of its expert."""


class SparseFTClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts with an expert on a frozen backbone.

    The fitted state is the files of a checkpoint, held in memory, so that pickle and joblib work; like any checkpoint,
    it lacks the backbone. A tenth of the texts of each class that has ten is held out to choose the best epoch; without
    such a class all rows choose it.

    Args:
        backbone: As for ``sparse_ft.train``; None, here as below, takes the default of the run config.
        rank: Rank of the expert's deltas.
        epochs: Passes over the data. None repeats small data until there are ``train.min_steps`` steps.
        learning_rate: Learning rate of expert and head.
        overrides: Any other settings, as ``--set`` takes them, e.g. ``["train.min_steps=100"]``.
        device: ``auto``, ``cpu``, ``cuda`` …
        random_state: Seed as in scikit-learn; None draws a new one at each ``fit``.

    Attributes:
        classes_: The labels, sorted, in the order of the columns of ``predict_proba``.
        checkpoint_: The files of the checkpoint, by path.
        backbone_: The parameter ``backbone`` at the time of ``fit``. A parameter that has changed since then says where
            the same backbone is now.
    """

    def __init__(
        self,
        *,
        backbone: str | None = None,
        rank: int | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        overrides: Sequence[str] = (),
        device: str | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.backbone = backbone
        self.rank = rank
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.overrides = overrides
        self.device = device
        self.random_state = random_state

    def fit(self, X: Sequence[str], y: Sequence[Any]) -> Self:
        """Train an expert and a head.

        Args:
            X: Texts, also as a 1-D array or a Series.
            y: Labels of the texts, at least two different ones.

        Raises:
            ValueError: If texts and labels do not fit each other, or there is only one class.
            SparseFTError: If the backbone or a setting is wrong.
        """
        texts = _texts(X)
        if y is None:
            raise ValueError("SparseFTClassifier requires y to be passed, but the target y is None.")
        labels = column_or_1d(y, warn=True)
        check_consistent_length(texts, labels)
        check_classification_targets(labels)
        classes, indices = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"SparseFTClassifier needs at least two classes, the data has one class: {classes}.")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        names = _label_names(classes)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "checkpoint"
            train(
                [_task(names)],
                data=_splits(texts, indices.tolist(), names=names),
                output=output,
                backbone=self.backbone,
                overrides=self._settings(),
                seed=seed,
                device=self.device,
            )
            model = load(output, device=self.device or "auto")
            files = _checkpoint_files(model.checkpoint)
        self.classes_, self.checkpoint_, self._model = classes, files, model  # together: a failed fit changes nothing
        self.backbone_ = self.backbone
        return self

    def predict(self, X: Sequence[str]) -> np.ndarray:
        """Return the most probable label of each text."""
        probabilities = self.predict_proba(X)
        return np.asarray(self.classes_[probabilities.argmax(1)])

    def predict_proba(self, X: Sequence[str]) -> np.ndarray:
        """Return the probability of every class, (texts, classes), float32."""
        check_is_fitted(self, "checkpoint_")
        probabilities: np.ndarray = self.model.probabilities(_texts(X), TASK).numpy()
        return probabilities

    @property
    def model(self) -> LoadedModel:
        """The fitted checkpoint, loaded; read again after unpickling."""
        check_is_fitted(self, "checkpoint_")
        if "_model" not in self.__dict__:
            with tempfile.TemporaryDirectory() as folder:
                _write_files(Path(folder), self.checkpoint_)
                fitted_with = getattr(self, "backbone_", None)  # the first pickles lack it
                moved = None if self.backbone == fitted_with else self.backbone
                self._model = load(folder, device=self.device or "auto", backbone=moved)
        return self._model

    def save(self, path: str | Path) -> Path:
        """Write the fitted checkpoint for ``sparse_ft.load`` and the command line into an empty or new folder.

        The checkpoint names no data, so ``sparse-ft evaluate`` needs ``--data``, a file with the columns ``text`` and
        ``label``.

        Raises:
            ConfigError: If the folder is not empty.
            CheckpointError: If the checkpoint cannot be written.
        """
        check_is_fitted(self, "checkpoint_")
        with claimed_output(path) as output:
            replace_folder(output, lambda folder: _write_files(folder, self.checkpoint_))
            return output

    def _settings(self) -> list[str]:
        """Return the parameters as overrides of the run config."""
        settings = {
            "experts.rank": self.rank,
            "train.epochs": self.epochs,
            "train.learning_rate": self.learning_rate,
        }
        given = [f"{key}={value}" for key, value in settings.items() if value is not None]
        return ["train.patience=0", *given, *self.overrides]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_model"}

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags


def _texts(X: Any) -> list[str]:
    """Return texts as a list.

    Raises:
        ValueError: If X is not a list or a 1-D array of texts, or is empty.
    """
    if isinstance(X, str | bytes):
        raise ValueError(f"Expected a list or 1-D array of texts, got a single {type(X).__name__}: {X!r}.")
    if getattr(X, "ndim", 1) != 1:
        raise ValueError(
            f"Expected 1-D texts, got {X.ndim}-D data of shape {X.shape}. Pass one column, e.g. X['text']."
        )
    texts = list(X)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"Expected texts, got {type(text).__name__}: {text!r}.")
    if not texts:
        raise ValueError("Expected at least one text, found 0 samples.")
    return [str(text) for text in texts]


def _label_names(classes: np.ndarray) -> list[str]:
    """Name the classes for the task, by their index if their own names collide or do not survive a file."""
    names = [str(entry) for entry in classes]
    good = len(set(names)) == len(names) and all(name and name == name.strip() for name in names)
    return names if good else [f"class_{index}" for index in range(len(names))]


def _task(labels: Sequence[str]) -> TaskSpec:
    columns: dict[str, Column] = {"text": "text", "label": "label"}
    return TaskSpec(name=TASK, kind="classification", columns=columns, labels=list(labels), metric="accuracy")


def _splits(texts: Sequence[str], indices: Sequence[int], *, names: Sequence[str]) -> DatasetDict:
    """Divide rows into training and validation; all rows validate if none is held out."""
    rows = Dataset.from_dict({"text": list(texts), "label": [names[index] for index in indices]})
    held = _held_out(texts, indices)
    validation = [row for row, out in enumerate(held) if out]
    train = [row for row, out in enumerate(held) if not out]
    return DatasetDict({"train": rows.select(train), "validation": rows.select(validation) if validation else rows})


def _held_out(texts: Sequence[str], indices: Sequence[int]) -> list[bool]:
    """Choose a tenth of each class at random, with a fixed seed; rows of one class with the same text stay together."""
    classes: dict[int, dict[str, list[int]]] = {}
    for row, (text, index) in enumerate(zip(texts, indices, strict=True)):
        classes.setdefault(index, {}).setdefault(text, []).append(row)
    held = [False] * len(texts)
    for index, by_text in sorted(classes.items()):
        groups = list(by_text.values())
        random.Random(index).shuffle(groups)
        room = sum(map(len, groups)) // 10
        for rows in groups:
            if len(rows) <= room:
                room -= len(rows)
                for row in rows:
                    held[row] = True
    return held


def _checkpoint_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files of a checkpoint by path, without the temporary folder of ``fit``."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "checkpoint"
        save_checkpoint(
            folder,
            model=checkpoint.model,
            tasks=checkpoint.tasks,
            config=changed_config(checkpoint.config, {"tasks": [TASK], "sources": {}, "output": None}),
            metrics=checkpoint.metrics,
        )
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        write_bytes(folder / name, content)
