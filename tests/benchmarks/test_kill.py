"""The killer of runs, on a few of them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks

KILL = Path(__file__).parents[2] / "benchmarks" / "kill.py"


def test_killed_runs_lose_nothing_and_end_alike():
    """In a process of its own, because it forks."""
    command = [sys.executable, KILL, "--kills", "9", "--commands", "joint,edit,export", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| joint", "| edit", "| export"))
    ]
    assert [(row[0], row[1], row[3:]) for row in rows] == [
        (f"| {name}", "3", ["0", "0", "0 |"]) for name in ("joint", "edit", "export")
    ]
