"""Train, score and compare methods on public data: one table, and a plot of score against what it took.

    python benchmarks/benchmark.py conll2003 --data-root DATA --seeds 13,14,15 --methods expert,full
    python benchmarks/benchmark.py english4 --data-root DATA --methods mixture,full --append benchmarks/results.md
    python benchmarks/benchmark.py fewshot --data-root DATA --seeds 13,14,15,16,17
    python benchmarks/benchmark.py clue --data-root DATA --backbone hfl/chinese-roberta-wwm-ext --submission handed_in/
    python benchmarks/benchmark.py sst2,banking77 --data-root DATA

Methods: expert (one of ours a task), mixture (one of our checkpoints for all tasks, each answered by its own expert),
and those of trainer_peers.py: full, full_pooled, bitfit, head, peft. All read the same rows through the same tokens,
from the same backbone, and are scored by the same code; the validation split chooses the best epoch, and test is scored
once per run. What ours have beyond that: heads on single texts begin at class means, label names included, and experts
that tag words see capitals. Epochs are those of our defaults, and for the peers those of trainer_peers.RECIPES.
fewshot: 10 rows a class, and 10 others to choose the epoch; without questions that are out of scope. clue: see clue.py;
tasks whose data is not there are left out; ``--backbone random-chars`` is a small Chinese character BERT with random
weights, which shows that the code runs and nothing else; ``--submission`` writes the files that the CLUE site accepts,
with the first seed's experts.

Each finished run is one line of ``--results``; what is there already, asked in the same way, is not run again. With
``--keep`` checkpoints stay, are scored again where ``--results`` is new, and are told by the commit that began them.
Seconds are those of the whole run, from reading the data to the test score; tokens per second are those of the training
steps (of the peers: of the Trainer without its evaluations).
"""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import clue
import torch
from benchmark_table import plot, section, table
from few_rows import draw
from parameters import trained_numbers
from runs import Entry, Runs, about
from script import chosen, listed, numbers, run
from submission import SUBMISSIONS, write_submission
from trainer_peers import PEER_KINDS, RATES, run_trainer

import sparse_ft
from sparse_ft.errors import DataError, SparseFTError
from sparse_ft.evaluation.evaluate import evaluate
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.sources import scored_splits
from sparse_ft.tasks.spec import load_task

SUITES = {
    "conll2003": ["conll2003"],
    "english4": ["sst2", "ag_news", "clinc150", "conll2003"],
    "fewshot": ["banking77", "clinc150"],
    "clue": clue.TASKS,
}
METHODS = ["expert", "mixture", *RATES, "peft"]
ROWS, EPOCHS = 10, 30
"""Of ``fewshot``: training rows a class, and epochs of the peers; ours repeats few rows by itself (train.min_steps)."""


class Subject(NamedTuple):
    """A task of the suite."""

    name: str
    file: str
    """What ``load_task`` takes."""
    source: Path | None
    """Its data; None where the task file knows it."""


class Benchmark:
    """The suite with its options.

    Args:
        options: Of the command line.
        scratch: For what is not kept.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.few, self.clue = options.suite == "fewshot", options.suite == "clue"
        self.tasks = SUITES.get(options.suite) or listed(options.suite)
        self.backbone = options.backbone
        self.asked_backbone = options.backbone
        if Path(options.backbone).is_dir():
            self.asked_backbone = str(Path(options.backbone).resolve())
        self.files: dict[str, Path] = {}
        if self.clue:
            there = {task: clue.task_file(task, options.data_root, scratch) for task in self.tasks}
            self.files = {task: path for task, path in there.items() if path is not None}
            self.tasks = list(self.files)
            lacking = ", ".join(task for task in there if task not in self.files)
            print(f"no data: {lacking or 'none is missing'}", flush=True)
            if not self.tasks:
                raise DataError(f"No task of CLUE has its data in {str(options.data_root)!r}: {lacking} are missing.")
            if self.backbone == "random-chars":
                self.asked_backbone += f" of {', '.join(self.tasks)}"  # whose characters it knows
                self.backbone = str(clue.build_random(scratch / "backbone", self.files, options.data_root))

    @property
    def bounded(self) -> bool:
        """Whether the options bound the training rows."""
        return any(override.startswith("data.train_limit=") for override in self.options.overrides)

    def subjects(self, tasks: list[str], *, seed: int, folder: Path) -> list[Subject]:
        root = self.options.data_root
        if self.few:
            return [Subject(task, str(self._drawn(task, seed=seed, folder=folder / task)), None) for task in tasks]
        return [Subject(task, str(self.files.get(task, task)), root / task) for task in tasks]

    def _drawn(self, task: str, *, seed: int, folder: Path) -> Path:
        folder.mkdir()
        source = self.options.data_root / task
        return draw(load_task(task), source, rows=ROWS, seed=seed, folder=folder, in_scope=True)

    def asked(self, method: str, group: list[str], seed: int) -> Entry:
        """Return what makes a run another one."""
        return {
            "method": method,
            "group": group,
            "seed": seed,
            "few": self.few,
            "overrides": self.options.overrides,
            "backbone": self.asked_backbone,
            "data": str(self.options.data_root.resolve()),
            "note": self.options.note,
            "device": self.options.device,
            "threads": self.options.threads,
            **({"files": {task: self.files[task].read_text(encoding="utf-8") for task in group}} if self.clue else {}),
        }

    def run(self, method: str, group: list[str], seed: int) -> list[dict[str, Any]]:
        """Return what was found, an entry a task."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            subjects = self.subjects(group, seed=seed, folder=Path(folder))
            if method in ("mixture", "expert"):
                return self._ours(method, subjects, seed=seed, folder=Path(folder))
            return [self._theirs(method, subject, seed=seed) for subject in subjects]

    def _theirs(self, method: str, subject: Subject, *, seed: int) -> dict[str, Any]:
        if subject.name == "cluener":
            raise DataError(f"CLUE scores the texts of entities, and {method} is scored on their positions.")
        found = run_trainer(
            method,
            subject.file,
            subject.source,
            seed,
            self.options.overrides,
            epochs=EPOCHS if self.few else None,
            backbone=self.backbone,
            device=self.options.device,
        )
        return {**found, "counted": not self.clue or subject.name in clue.COUNTED}

    def _ours(self, method: str, subjects: list[Subject], *, seed: int, folder: Path) -> list[dict[str, Any]]:
        """Train the tasks into one checkpoint, which stays under ``--keep``, and score it."""
        names, group = {load_task(subject.file).name: subject for subject in subjects}, [one.name for one in subjects]
        output = (self.options.keep or folder) / self._folder(method, group, seed)
        by, kept = _origin(output), self.keeps(method, group, seed)
        if kept:
            print(f"{output} is trained already", flush=True)
        found = {} if kept else self._trained(names, output, seed=seed, by=by)
        model = load(output, device=self.options.device)
        splits = scored_splits(model.tasks, model.checkpoint.config.sources)
        evaluation = found.pop("evaluation", None) or evaluate(output, split=splits, device=self.options.device)
        entries = []
        for task, subject in names.items():
            score, split, spec = evaluation.tasks[task].score, evaluation.splits[task], model.tasks[task]
            entry = {
                "metrics": dict(score.metrics),
                "metric": spec.metric,
                "scored_on": f"{split}, {score.n:,} rows",
                "token_report": score.token_report,
                "validation": model.checkpoint.metrics[task]["validation"],
                "trainable": trained_numbers(model.checkpoint.model, [task]),
                "about": by.read_text(encoding="utf-8"),
                **found,
            }
            if self.clue:
                entry |= clue.view(model, task, split, score=score, source=subject.source, limit=self._limit(task))
            entries.append({**entry, "headline": entry["metrics"][entry["metric"]]})
            if self.lacks(method, task, seed):
                self._hand_in(model, task, subject.source)
        return entries

    def _folder(self, method: str, group: list[str], seed: int) -> str:
        """Name the checkpoint of a run by what was asked."""
        request = json.dumps(self.asked(method, group, seed))
        return f"{method}-{'+'.join(group)}-{seed}-{hashlib.sha256(request.encode()).hexdigest()[:8]}".replace("/", "-")

    def keeps(self, method: str, group: list[str], seed: int) -> bool:
        """Say whether the checkpoint of a run is there, with all that is needed to score it."""
        if self.options.keep is None or self.few or self.options.backbone == "random-chars":
            return False  # rows and weights that were made for one call have gone with it
        output = self.options.keep / self._folder(method, group, seed)
        return (output / "manifest.json").exists() and _origin(output).exists()

    def _trained(self, names: dict[str, Subject], output: Path, *, seed: int, by: Path) -> dict[str, Any]:
        """Train, or go on with a run that was interrupted, and note in ``by`` what code and machine began it."""
        started = time.perf_counter()
        resumed = (output / "resume").exists() and by.exists() and not self.few and not self.clue
        if output.exists() and not resumed:
            shutil.rmtree(output)  # its task file has gone, or it is not known where it came from
        limit = self._limit(next(iter(names)))
        if not resumed:
            by.parent.mkdir(parents=True, exist_ok=True)
            by.write_text(about(), encoding="utf-8")
        result = sparse_ft.train(
            [subject.file for subject in names.values()],
            data={task: str(subject.source) for task, subject in names.items() if subject.source is not None} or None,
            backbone=self.backbone,
            output=output,
            seed=seed,
            overrides=[*([f"data.train_limit={limit}"] if limit else []), *self.options.overrides],
            device=self.options.device,
            resume=resumed,
        )
        return {
            "evaluation": result.evaluation,
            "seconds": None if resumed else (time.perf_counter() - started) / len(names),
            "tokens_per_second": result.tokens_per_second,
        }

    def _limit(self, task: str) -> int | None:
        """Return how many training rows of a CLUE task are taken where the options do not say."""
        return clue.LIMITS.get(task) if self.clue and not self.bounded else None

    def lacks(self, method: str, task: str, seed: int) -> bool:
        """Say whether the file for the CLUE site is yet to be written: with the experts of the first seed."""
        if method != "expert" or not self.clue or self.options.submission is None or task not in SUBMISSIONS:
            return False
        first, wanted = numbers(self.options.seeds)[0], SUBMISSIONS[task]
        there = clue.is_there(self.options.data_root / task, wanted.test)
        return seed == first and there and not (self.options.submission / wanted.file).exists()

    def _hand_in(self, model: LoadedModel, task: str, source: Path) -> None:
        try:
            print(f"{task}: {write_submission(model, task, data=source, output=self.options.submission)}", flush=True)
        except SparseFTError as error:
            print(f"{task}: nothing to hand in. {error}", flush=True)


def _origin(output: Path) -> Path:
    """Return the file beside a checkpoint that says which code and machine began it."""
    return output.with_name(f"{output.name}.txt")


def run_all(benchmark: Benchmark, methods: list[str], seeds: list[int], runs: Runs) -> list[Entry]:
    """Run what is not there yet, and return all that was asked for; a run that fails is said, and the others go on."""
    entries: list[Entry] = []
    for seed in seeds:
        for method in methods:
            for group in [benchmark.tasks] if method == "mixture" else [[task] for task in benchmark.tasks]:
                request = benchmark.asked(method, group, seed)
                done = runs.find(request)
                lacking = [task for task in group if benchmark.lacks(method, task, seed)]
                if done and lacking and not benchmark.keeps(method, group, seed):
                    print(f"{lacking[0]}: no checkpoint to answer with; --keep keeps them.", flush=True)
                    lacking = []
                if not done or lacking:
                    try:
                        found = benchmark.run(method, group, seed)
                    except (SparseFTError, ValueError, RuntimeError) as error:  # of torch or transformers the others
                        print(f"{'+'.join(group)} {method} {seed}: {error}", flush=True)
                        continue
                    for task, result in zip(group, found, strict=True):
                        entry = result if done else runs.add({**request, "task": task}, result)
                        took = "" if entry.get("seconds") is None else f", {entry['seconds']:.0f} s"
                        shown = f"validation {entry['validation']:.4f}, {entry['headline']:.4f}{took}"
                        print(f"{task} {method} {seed} {benchmark.options.note}: {shown}", flush=True)
                entries.extend({entry["task"]: entry for entry in runs.find(request)}.values())
    return entries


def command(options: argparse.Namespace) -> str:
    """Return the command that gives the table, without what is only of this machine."""
    words = ["python", "benchmarks/benchmark.py", options.suite, "--data-root", "DATA", "--seeds", options.seeds]
    backbone = Path(options.backbone).name if Path(options.backbone).is_dir() else options.backbone
    given = {"--methods": options.methods, "--backbone": backbone, "--device": options.device}
    words += [word for name, value in given.items() if value not in (None, "minilm", "cpu") for word in (name, value)]
    return shlex.join([*words, *(word for override in options.overrides for word in ("--set", override))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", help=f"{', '.join(SUITES)}, or names of tasks separated by commas")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with conll2003/, sst2/, …")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; default expert,full, and for clue expert")
    parser.add_argument("--seeds", default="13,14,15")
    parser.add_argument("--backbone", default="minilm", help="hub id, folder, minilm, or for clue random-chars")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        help="section.key=value, for ours; the peers heed data.train_limit",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--note", default="", help="kept with each result")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path("benchmark.jsonl"))
    parser.add_argument("--keep", type=Path, help="folder where the checkpoints of expert and mixture stay")
    parser.add_argument("--submission", type=Path, help="folder for the files of the CLUE site")
    parser.add_argument("--plot", type=Path, help="PNG of score against parameters and seconds")
    parser.add_argument("--append", type=Path, help="Markdown file that gets the table, e.g. benchmarks/results.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    request = options.methods or ("expert" if options.suite == "clue" else "expert,full")
    methods, seeds = chosen(request, METHODS, what="method"), numbers(options.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        benchmark = Benchmark(options, Path(scratch))
        kinds = {task: load_task(str(benchmark.files.get(task, task))).kind for task in benchmark.tasks}
        if "mixture" in methods and not clue.LIMITS.keys().isdisjoint(benchmark.files) and not benchmark.bounded:
            parser.error(
                "a mixture of all of CLUE holds 577,157 blanks of ChID: bound it with --set data.train_limit=20000"
            )
        for task, kind in kinds.items():
            peers = [method for method in methods if method not in ("expert", "mixture")]
            if peers and kind not in PEER_KINDS:
                parser.error(f"{peers[0]!r} is for {' and '.join(PEER_KINDS)}, and {task!r} is {kind}")
        entries = run_all(benchmark, methods, seeds, Runs(options.results))
    if not entries:
        sys.exit("Nothing was scored.")
    hint = clue.NOTES.get(options.backbone, "") if options.suite == "clue" else ""
    print(hint + "\n" + table(entries) if hint else table(entries))
    if options.plot:
        plot(entries, options.plot)
    if options.append:
        title = " ".join(filter(None, (options.suite, options.note, hint and f"({hint})")))
        with options.append.open("a", encoding="utf-8") as stream:
            stream.write(section(title, command(options), entries))


if __name__ == "__main__":
    run(main)
