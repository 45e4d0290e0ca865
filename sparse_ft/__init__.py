"""sparse-ft: one frozen backbone, one LoRA-sized expert per task."""

import importlib
from typing import TYPE_CHECKING, Any

from sparse_ft.version import __version__

if TYPE_CHECKING:
    from sparse_ft.errors import SparseFTError
    from sparse_ft.evaluation.evaluate import Evaluation, evaluate
    from sparse_ft.integrations.export import Export, export
    from sparse_ft.integrations.import_peft import Import, import_adapter
    from sparse_ft.integrations.sklearn_estimator import SparseFTClassifier
    from sparse_ft.merging.edit import Edit, edit
    from sparse_ft.merging.merge import Merge, merge
    from sparse_ft.prediction.loaded_model import LoadedModel, load, predict
    from sparse_ft.tasks.kinds.answers import Prediction
    from sparse_ft.training.distill import Distillation, distill
    from sparse_ft.training.train import TrainResult, train

# Imported when first used: torch and transformers take seconds, `sparse-ft --help` must not wait for them.
_HOMES = {
    "Distillation": "sparse_ft.training.distill",
    "Edit": "sparse_ft.merging.edit",
    "Evaluation": "sparse_ft.evaluation.evaluate",
    "Export": "sparse_ft.integrations.export",
    "Import": "sparse_ft.integrations.import_peft",
    "LoadedModel": "sparse_ft.prediction.loaded_model",
    "Merge": "sparse_ft.merging.merge",
    "Prediction": "sparse_ft.tasks.kinds.answers",
    "SparseFTClassifier": "sparse_ft.integrations.sklearn_estimator",
    "SparseFTError": "sparse_ft.errors",
    "TrainResult": "sparse_ft.training.train",
    "distill": "sparse_ft.training.distill",
    "edit": "sparse_ft.merging.edit",
    "evaluate": "sparse_ft.evaluation.evaluate",
    "export": "sparse_ft.integrations.export",
    "import_adapter": "sparse_ft.integrations.import_peft",
    "load": "sparse_ft.prediction.loaded_model",
    "merge": "sparse_ft.merging.merge",
    "predict": "sparse_ft.prediction.loaded_model",
    "train": "sparse_ft.training.train",
}

__all__ = [
    "Distillation",
    "Edit",
    "Evaluation",
    "Export",
    "Import",
    "LoadedModel",
    "Merge",
    "Prediction",
    "SparseFTClassifier",
    "SparseFTError",
    "TrainResult",
    "__version__",
    "distill",
    "edit",
    "evaluate",
    "export",
    "import_adapter",
    "load",
    "merge",
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
