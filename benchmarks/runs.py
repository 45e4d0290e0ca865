"""Finished runs, a line of JSON each: what is there already, asked in the same way, is not run again."""

import json
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

Entry = dict[str, Any]


class Runs:
    """The runs in a file, which need not be there yet.

    Args:
        path: JSON lines.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.about = path, about()  # before hours of training, in which the commit may change

    def find(self, request: Mapping[str, Any]) -> list[Entry]:
        """Return what was found when the same was asked, the latest last."""
        lines = self._text().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # else a kill tore it
        return [entry for entry in entries if all(entry.get(key) == value for key, value in request.items())]

    def add(self, request: Mapping[str, Any], results: Mapping[str, Any]) -> Entry:
        """Write one more; ``found`` may say itself where it was found."""
        entry = {"about": self.about, **request, **results}
        text = self._text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        return entry

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""


def about() -> str:
    """Name the machine, the versions and the commit."""
    try:
        described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu}{gpu}, {threads}; Python {platform.python_version()}, {versions}; commit {commit or 'unknown'}"


def mean_and_spread(values: Sequence[float]) -> str:
    """Write the mean of a score over the seeds, and its standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
