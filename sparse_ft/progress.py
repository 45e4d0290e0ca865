"""Progress bars on stderr, all made in one place, and the switches that silence them."""

import os
import sys
from typing import Any

from tqdm.auto import tqdm

_DELAY = 2.0
"""Seconds after which the bar of a phase appears; a shorter phase shows none."""


def progress_bar(
    title: str | None, *, total: int | None = None, initial: int = 0, unit: str = "row", phase: bool = True
) -> "tqdm[Any]":
    """Return a bar to update by hand, as a context.

    It shows nothing where ``TQDM_DISABLE`` is set, or the bars of transformers or datasets are switched off.

    Args:
        title: What is done, e.g. ``scoring ner``; None shows nothing.
        total: Number of steps, if it is known.
        initial: Steps that an earlier run made.
        unit: What is counted.
        phase: Whether the bar appears after two seconds only and goes when it is full; if not, it appears at once and
            stays.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        mininterval=0.5,
        delay=_DELAY if phase else 0,
        leave=not phase,
        disable=title is None or _silenced(),
    )


def _silenced() -> bool:
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return True
    if os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS", "").lower() in ("1", "true", "yes", "on"):
        return True
    transformers, datasets = sys.modules.get("transformers.utils.logging"), sys.modules.get("datasets")
    if transformers is not None and not transformers.is_progress_bar_enabled():
        return True
    return datasets is not None and bool(datasets.are_progress_bars_disabled())
