"""sparse-ft: one frozen backbone, one LoRA-sized expert per task."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_ft.errors import SparseFTError
    from sparse_ft.evaluation import Evaluation, evaluate
    from sparse_ft.exporting import Export, export
    from sparse_ft.prediction import LoadedModel, Prediction, load, predict
    from sparse_ft.training import TrainResult, train

__version__ = "0.1.0"

# Imported when first used: torch and transformers take seconds, `sparse-ft --help` must not wait for them.
_HOMES = {
    "Evaluation": "sparse_ft.evaluation",
    "Export": "sparse_ft.exporting",
    "LoadedModel": "sparse_ft.prediction",
    "Prediction": "sparse_ft.prediction",
    "SparseFTError": "sparse_ft.errors",
    "TrainResult": "sparse_ft.training",
    "evaluate": "sparse_ft.evaluation",
    "export": "sparse_ft.exporting",
    "load": "sparse_ft.prediction",
    "predict": "sparse_ft.prediction",
    "train": "sparse_ft.training",
}

__all__ = [
    "Evaluation",
    "Export",
    "LoadedModel",
    "Prediction",
    "SparseFTError",
    "TrainResult",
    "__version__",
    "evaluate",
    "export",
    "load",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_ft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
