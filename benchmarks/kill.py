"""Kill commands at random moments and at chosen points of their saves, and compare what comes of them bit for bit.

    python benchmarks/kill.py --kills 200

Every run is forked from this process, which has everything imported and computes nothing. Half of the runs are killed
after a random time between their begin and their end, half before a random call of the operating system that makes,
renames, syncs or removes a file; some are killed once more when they go on. Then a reader looks at the output, the run
is resumed, or begun anew where there is nothing to resume, and all files are compared with those of an uninterrupted
run. Lost: the second run, or the reader, fails. Differing: a file has other bytes. Litter: something lies beside it.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peft  # noqa: F401  # this and the following are imported once, for all forks
import seqeval.metrics  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import transformers.models.bert  # noqa: F401
from script import chosen, run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_backbones import save_tiny
from toys import OPTIONS, settings, write_toy

import sparse_ft
import sparse_ft.integrations.exporters.transformers_folder
import sparse_ft.training.train
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError, SparseFTError
from sparse_ft.integrations.export import export
from sparse_ft.merging.edit import edit
from sparse_ft.merging.merge import merge
from sparse_ft.training.distill import distill

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod")
"""Functions of ``os`` before whose calls a run is killed."""
LAST = 60
"""Half of the chosen points are among so many last ones: there the checkpoint takes its place."""
MUST_NOT_EXIST = ("holds a checkpoint already", "is not empty and no checkpoint", "holds a finished checkpoint")
"""What a command says that is run again although it was done when it was killed."""


@dataclass
class Workshop:
    """The folders of all runs."""

    root: Path
    backbone: Path = field(init=False)
    start: Path = field(init=False)
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.backbone, self.start = self.root / "backbone", self.root / "start"
        self.output = self.root / "runs" / "out"  # the same for all runs, because configs name it

    def prepare(self) -> None:
        """Write backbone, data and the checkpoint that is edited, merged and exported."""
        save_tiny(self.backbone, "bert")
        for name, size in (("mood", 36), ("names", 20)):
            write_toy(self.root, name, sizes=(size, 8, 8))
        self.train(self.start)

    def train(self, output: Path, *, stage: str | None = None, resume: bool = False, **changes: object) -> None:
        tasks = [] if resume else [str(self.root / f"{name}.yaml") for name in ("mood", "names")]
        overrides = [] if resume else settings(**{**OPTIONS, "train__workers": 1, **changes})
        named = {} if resume else {"backbone": str(self.backbone), "device": "cpu", "stage": stage}
        sparse_ft.train(tasks, output=output, overrides=overrides, resume=resume, **named)


def train(shop: Workshop, resume: bool) -> None:
    shop.train(shop.output, resume=resume)


def joint(shop: Workshop, resume: bool) -> None:
    shop.train(shop.output, stage="joint", resume=resume, gate__jitter=0.1)


def joint_tokens(shop: Workshop, resume: bool) -> None:
    shop.train(shop.output, stage="joint", resume=resume, gate__type="token", experts__pool=3)


def distil(shop: Workshop, resume: bool) -> None:
    overrides = [] if resume else settings(**{**OPTIONS, "train__workers": 1})
    distill(shop.start, output=shop.output, passes=1.7, overrides=overrides, resume=resume, device="cpu")


def edit_experts(shop: Workshop, resume: bool) -> None:
    edit(shop.start, output=shop.output, copy=[("names", "again")], prune=[("names", 2)], rename=[("mood", "feeling")])


def merge_experts(shop: Workshop, resume: bool) -> None:
    experts = [(None, shop.start / "experts" / name) for name in ("mood", "names")]
    merge(experts, method="ties", output=shop.output, name="both", device="cpu")


def export_tasks(shop: Workshop, resume: bool) -> None:
    export(shop.start, format="transformers", output=shop.output)


COMMANDS: dict[str, Callable[[Workshop, bool], None]] = {
    "train": train,
    "joint": joint,
    "joint-tokens": joint_tokens,
    "distill": distil,
    "edit": edit_experts,
    "merge": merge_experts,
    "export": export_tasks,
}
RESUMED = {"train", "joint", "joint-tokens", "distill"}


@dataclass
class Tally:
    """What became of the killed runs of a command."""

    kills: int = 0
    at_points: int = 0
    done: int = 0
    """Runs that ended before the kill came."""
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """An uninterrupted run."""

    files: dict[str, str]
    """Path to hash."""
    seconds: float
    points: int
    """Number of calls before which the run can be killed."""


def in_child(work: Callable[[], None], log: Path, *, kill_after: float | None = None) -> int:
    """Run a function in a fork, and kill it after some seconds; return its exit code, or -9."""
    child = os.fork()
    if child == 0:
        _become_child(work, log)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # which does nothing to a child that has ended
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become_child(work: Callable[[], None], log: Path) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def count_calls(at: int | None, counter: Path | None = None) -> Callable[[], None]:
    """Count the calls of ``CALLS`` in this process, and kill it before one; return a function that notes how many."""
    count = 0

    def counted(function):
        def call(*arguments, **named):
            nonlocal count
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: None if counter is None else Path(counter).write_text(str(count))


def go_on(shop: Workshop, command: str) -> None:
    """Resume a run, or begin it anew; do nothing if it was done."""
    try:
        if command in RESUMED:
            try:
                COMMANDS[command](shop, True)
            except ConfigError as error:
                if "There is no unfinished run" not in str(error) or MUST_NOT_EXIST[-1] in str(error):
                    raise
            else:
                return
        COMMANDS[command](shop, False)
    except ConfigError as error:
        if not any(said in str(error) for said in MUST_NOT_EXIST):
            raise


def look(shop: Workshop) -> None:
    """Load the output as a reading command does, which may refuse it but not change it."""
    before = sorted(shop.output.parent.rglob("*"))
    with contextlib.suppress(SparseFTError):
        load_checkpoint(shop.output)
    assert sorted(shop.output.parent.rglob("*")) == before, "a reader changed the folder"


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def reference(shop: Workshop, command: str, log: Path) -> Reference:
    """Run a command twice without a kill; both runs must end alike."""
    counter = shop.root / "points"

    def work():
        note = count_calls(None, counter)
        COMMANDS[command](shop, False)
        note()

    ends, seconds = [], 0.0
    for _ in range(2):
        clear(shop)
        log.unlink(missing_ok=True)
        started = time.monotonic()
        if in_child(work, log):
            sys.exit(f"{command} fails without a kill:\n{log.read_text()}")
        seconds = time.monotonic() - started
        ends.append(hashes(shop.output))
    if ends[0] != ends[1]:
        sys.exit(f"{command} does not end alike twice: {differences(*ends)}")
    return Reference(ends[0], seconds, int(counter.read_text()))


def differences(left: dict[str, str], right: dict[str, str]) -> list[str]:
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def clear(shop: Workshop) -> None:
    shutil.rmtree(shop.output.parent, ignore_errors=True)
    shop.output.parent.mkdir()


def kill_once(shop: Workshop, command: str, known: Reference, tally: Tally, generator: random.Random, log: Path) -> str:
    """Kill a run, let it go on, and judge; return what was done."""
    log.unlink(missing_ok=True)
    clear(shop)
    done, killed = [], False
    for work in (lambda: COMMANDS[command](shop, False), lambda: go_on(shop, command)):
        moment = draw(known, generator)
        done.append(f"point {moment}" if isinstance(moment, int) else f"{moment:.3f} s")
        code = strike(work, moment, log)
        killed = killed or code == -signal.SIGKILL
        tally.at_points += isinstance(moment, int)
        if generator.random() < 0.7:  # else it is killed once more
            break
    tally.kills += 1
    tally.done += not killed
    what = f"{command} killed at {', '.join(done)}"
    if in_child(lambda: look(shop), log) or in_child(lambda: go_on(shop, command), log):
        tally.lost.append(f"{what}\n{log.read_text()}")
        return what
    if wrong := differences(hashes(shop.output), known.files):
        tally.differing.append(f"{what}: {', '.join(wrong)}")
    if others := sorted(path.name for path in shop.output.parent.iterdir() if path != shop.output):
        tally.litter.append(f"{what}: {', '.join(others)}")
    return what


def draw(known: Reference, generator: random.Random) -> int | float:
    """Draw a point of the saves, or a time in seconds."""
    if generator.random() < 0.5:
        return generator.uniform(0, known.seconds)
    first = max(0, known.points - LAST) if generator.random() < 0.5 else 0
    return generator.randrange(first, known.points)


def strike(work: Callable[[], None], moment: int | float, log: Path) -> int:
    """Run a function in a fork that is killed at a point or after a time; return its exit code."""
    if isinstance(moment, float):
        return in_child(work, log, kill_after=moment)

    def counted():
        count_calls(moment)
        work()

    return in_child(counted, log)


def table(tallies: dict[str, Tally]) -> str:
    lines = ["| command | kills | ended before | lost | differing | litter |", "|---|---:|---:|---:|---:|---:|"]
    for name, tally in tallies.items():
        counts = (tally.kills, tally.done, len(tally.lost), len(tally.differing), len(tally.litter))
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="Runs to kill, shared out among the commands.")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="Commands, with commas between them.")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--seconds", type=float, default=None, help="Stop after so many seconds.")
    options = parser.parse_args()
    commands = chosen(options.commands, COMMANDS, what="command")
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    generator, started = random.Random(options.seed), time.monotonic()
    tallies = {name: Tally() for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        shop, log = Workshop(Path(folder)), Path(folder) / "log"
        if in_child(shop.prepare, log):
            sys.exit(log.read_text())
        known = {name: reference(shop, name, log) for name in commands}
        for name, expected in known.items():
            print(
                f"{name}: {expected.seconds:.1f} s, {expected.points} points, {len(expected.files)} files", flush=True
            )
        for number in range(options.kills):
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                print(f"Stopped after {number} kills.")
                break
            name = commands[number % len(commands)]
            kill_once(shop, name, known[name], tallies[name], generator, log)
    faults = [text for tally in tallies.values() for text in (*tally.lost, *tally.differing, *tally.litter)]
    print(*faults, sep="\n")
    print(f"\n{table(tallies)}\n\n{time.monotonic() - started:.0f} s, seed {options.seed}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    run(main)
