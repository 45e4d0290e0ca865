"""The task kinds, by the name that task files use."""

from sparse_ft.errors import ConfigError, unknown_name
from sparse_ft.tasks.kinds.classification import Classification
from sparse_ft.tasks.kinds.kind import TaskKind
from sparse_ft.tasks.kinds.multi_label import MultiLabel
from sparse_ft.tasks.kinds.multiple_choice import MultipleChoice
from sparse_ft.tasks.kinds.span_extraction import SpanExtraction
from sparse_ft.tasks.kinds.token_classification import TokenClassification

KINDS: dict[str, TaskKind] = {
    "classification": Classification(),
    "multi_label": MultiLabel(),
    "token_classification": TokenClassification(),
    "span_extraction": SpanExtraction(),
    "multiple_choice": MultipleChoice(),
}


def find_kind(name: str) -> TaskKind:
    """Return the task kind of this name.

    Raises:
        ConfigError: If no kind has this name.
    """
    if name not in KINDS:
        raise ConfigError(unknown_name("kind", name, KINDS))
    return KINDS[name]
