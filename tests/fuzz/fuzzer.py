"""Run the command line on damaged inputs, and find what it must never do.

    python tests/fuzz/fuzzer.py --cases 5000 --seed 0

A case is one damaged file and one command in this process. The command may do its work, or refuse with exit code 2 and
one line that says why; everything else is a fault, see ``faults_of``. Cases of one seed are the same on every machine.
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from toy_checkpoints import sign

from fuzz.mutations import mutate
from fuzz.subjects import SUBJECTS, Subject, write_inputs

LIMIT = 20
"""Seconds that one command may take."""


class Trained(BaseException):
    """Raised where training would begin: the inputs were accepted, and what follows does not depend on them."""


@dataclass(frozen=True)
class Case:
    """What one command did with one damaged input."""

    seed: str
    subject: Subject
    damage: str
    code: int
    """Exit code; -1 for an exception that left the command line or a command over the limit."""
    out: str
    error: str
    faults: tuple[str, ...]


def run_case(seed: str, inputs: Path, *, bert: Path, answers: Mapping[str, str]) -> Case:
    """Damage one input and run its command.

    Args:
        seed: Seed of the case.
        inputs: Folder of the undamaged inputs, see ``subjects.write_inputs``; not changed.
        bert: Undamaged backbone.
        answers: Standard output of the undamaged checkpoint by name of the subject.
    """
    generator = random.Random(seed)
    subject = generator.choice(SUBJECTS)
    with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
        folder = Path(root)
        shutil.copytree(inputs, folder, dirs_exist_ok=True, copy_function=_link)
        file = generator.choice(sorted(path for path in folder.glob(subject.files) if path.is_file()))
        content = _own(file)
        damage = mutate(file, generator)
        forged = subject.files.startswith("checkpoint/") and file.name != "manifest.json" and generator.random() < 0.5
        if forged:  # the manifest has the hashes of the damaged files, so that what reads them is tried, too
            _own(folder / "checkpoint" / "manifest.json")
            sign(folder / "checkpoint")
        before = set(folder.rglob("*"))
        code, out, error = run_command(subject.command, bert=bert)
        new = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
        same = file.read_bytes() == content
    hashed = subject.is_checkpoint and file.name not in {"manifest.json", "metrics.json"}
    expected = None if forged else answers.get(subject.name)
    faults = faults_of(code, out, error, new, expected=expected, refusal_only=hashed and not same)
    return Case(seed, subject, damage, code, out, error, faults)


def _link(source: str, target: str) -> None:
    os.link(source, target)


def _own(file: Path) -> bytes:
    """Replace a link to an undamaged file by a copy; return its content."""
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    return content


def faults_of(
    code: int, out: str, error: str, new: list[str], *, expected: str | None, refusal_only: bool
) -> tuple[str, ...]:
    """Return what a command did wrong: a traceback, half an output, an answer of a damaged checkpoint, no JSON."""
    faults = []
    last = error.strip().splitlines()[-1:] or [""]
    if code not in (0, 2) or "Traceback" in error:
        faults.append("traceback")
    elif code == 2 and not last[0].startswith("Error: ") and "Usage: " not in error:
        faults.append("no reason")
    if code != 0 and new:
        faults.append(f"left behind: {', '.join(new[:3])}")
    if expected is not None and code == 0 and (out != expected or refusal_only):
        faults.append("answers of a damaged checkpoint")
    if any(word in out for word in ("NaN", "Infinity")):
        faults.append("no JSON")
    return tuple(faults)


def run_command(command: str, *, bert: Path) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, standard output and standard error."""
    from sparse_ft.cli import main as command_line
    from sparse_ft.training import train as training

    logger = logging.getLogger("sparse_ft")
    handlers, level = list(logger.handlers), logger.level
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    arguments = ["sparse-ft", *shlex.split(command.format(bert=bert))]
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
            mock.patch.object(training, "_fit", side_effect=Trained),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
            _time_limit(),
        ):
            command_line.main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Trained:
        pass
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
        code = -1
        error.write(f"\nTraceback of {type(problem).__name__}: {problem}")
    finally:
        logger.handlers, logger.level = handlers, level
    return code, *(stream.buffer.getvalue().decode("utf-8", errors="replace") for stream in (out, error))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"over {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def undamaged_answers(inputs: Path, *, bert: Path) -> dict[str, str]:
    """Run every command on undamaged inputs; return the output of those that answer from a checkpoint.

    Raises:
        AssertionError: If a command fails, so that its cases would say nothing.
    """
    answers = {}
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as root, contextlib.chdir(root):
            shutil.copytree(inputs, root, dirs_exist_ok=True)
            code, out, error = run_command(subject.command, bert=bert)
        assert code == 0, f"{subject.name}: {error}"
        if subject.is_checkpoint:
            answers[subject.name] = out
    return answers


def table(cases: list[Case], *, seconds: float) -> str:
    """Return the counts by subject as a Markdown table."""
    lines = ["| input | cases | done | refused | faults |", "|---|---:|---:|---:|---:|"]
    by_subject = collections.defaultdict(list)
    for case in cases:
        by_subject[case.subject.name].append(case)
    for name, group in [*sorted(by_subject.items()), ("all", cases)]:
        counts = [len(group), sum(case.code == 0 for case in group), sum(case.code == 2 for case in group)]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {sum(bool(case.faults) for case in group)} |")
    return "\n".join([*lines, f"\n{len(cases)} cases in {seconds:.0f} s"])


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        inputs, bert = write_inputs(Path(root))
        answers = undamaged_answers(inputs, bert=bert)
        start, cases = time.monotonic(), []
        for number in range(arguments.first, arguments.first + arguments.cases):
            cases.append(run_case(f"{arguments.seed}/{number}", inputs, bert=bert, answers=answers))
            if cases[-1].faults:
                case = cases[-1]
                shown = {"seed": case.seed, "input": case.subject.name, "damage": case.damage, "faults": case.faults}
                _print(json.dumps({**shown, "error": case.error.strip()[-300:]}, ensure_ascii=False))
    _print(table(cases, seconds=time.monotonic() - start))
    sys.exit(any(case.faults for case in cases))


if __name__ == "__main__":
    main()
