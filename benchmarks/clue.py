"""Train and score every CLUE task whose data is there, and write the files that the CLUE site accepts.

    python benchmarks/clue.py --data-root DATA --backbone hfl/chinese-roberta-wwm-ext --seeds 13,14,15
    python benchmarks/clue.py --data-root DATA --backbone random-chars --tasks tnews,cluener --set data.train_limit=200
    python benchmarks/clue.py --data-root DATA --submission handed_in/

DATA holds one folder a task (afqmc/, tnews/ …), with the files as CLUE ships them, or as FewCLUE does. A task is scored
on test where that has answers, else on validation. CLUE's score is the mean over its nine tasks: accuracy, and exact
match of CMRC 2018. CLUENER has two figures, because CLUE averages F1 over types and others count all entities together;
CLUE's own script counts the same text in one sentence once, here every place counts. `--backbone random-chars` builds a
small Chinese character BERT with random weights, which shows that the code runs and nothing else. `--submission` writes
the files for the first seed.
"""

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import torch
import yaml

import sparse_ft
from sparse_ft.errors import SparseFTError
from sparse_ft.readers import read
from sparse_ft.submission import SUBMISSIONS, write_submission
from sparse_ft.tasks import load_task, task_path

TASKS = ["afqmc", "tnews", "iflytek", "ocnli", "cluewsc", "csl", "cmrc2018", "chid", "c3", "cmnli", "drcd", "cluener"]
COUNTED = TASKS[:9]
"""What CLUE's score is the mean of, in version 1.1."""
HEADLINE = {"cmrc2018": "exact_match", "drcd": "exact_match", "cluener": "macro_f1"}
SECOND = {"cmrc2018": "answer_f1", "drcd": "answer_f1", "cluener": "f1"}
NOTES = {
    "minilm": "English backbone: says nothing of quality on Chinese",
    "random-chars": "random weights: says nothing of quality",
}
CHARACTERS = 6000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with afqmc/, tnews/, …")
    parser.add_argument("--backbone", default="minilm", help="hub id, folder, minilm, or random-chars")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="13")
    parser.add_argument("--submission", type=Path, help="folder for the files of the CLUE site")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="section.key=value")
    parser.add_argument("--output", type=Path, help="folder to keep the checkpoints in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = {task: task_file(task, options.data_root, Path(scratch)) for task in options.tasks.split(",")}
        found = {task: path for task, path in files.items() if path is not None}
        print("no data: " + (", ".join(task for task in files if task not in found) or "none is missing"), flush=True)
        backbone = options.backbone
        if backbone == "random-chars":
            backbone = str(build_random(Path(scratch) / "backbone", found, options.data_root))
        folder = options.output or Path(scratch) / "runs"
        rows = [score_task(task, path, options, backbone=backbone, folder=folder) for task, path in found.items()]
    print_table(rows, note=NOTES.get(options.backbone, options.backbone))


def task_file(task: str, root: Path, scratch: Path) -> Path | None:
    """Write a task file that names the files which are there; None if its training rows are not.

    CLUE has test.json where FewCLUE has test_public.json, and OCNLI comes with a large and a small training file.
    """
    content = yaml.safe_load(task_path(f"clue/{task}").read_text(encoding="utf-8"))
    files = content["files"]
    if task == "ocnli" and is_there(root / task, "train.50k.json"):
        files["train"] = "train.50k.json"
    if not is_there(root / task, files["test"]):
        files["test"], files["unlabelled"] = "test.json", ["test"]
    if not is_there(root / task, files["test"]):
        del files["test"]
    path = scratch / f"{task}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    names = files["train"] if isinstance(files["train"], list) else [files["train"]]
    return path if all(is_there(root / task, name) for name in names) else None


def is_there(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / f"{name}.gz").exists()


def build_random(folder: Path, tasks: dict[str, Path], root: Path) -> Path:
    """Save a BERT of two blocks with random weights that knows the commonest characters of the training texts."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    counts: Counter[str] = Counter()
    for task, path in tasks.items():
        rows = read(load_task(path), data=root / task, splits=["train"])["train"]
        for name in {"text", "text_pair", "tokens"} & set(rows.column_names):
            counts.update(character for text in rows[name] for character in "".join(text or "").lower())
    common = [character for character, _ in counts.most_common(CHARACTERS) if not character.isspace()]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common]) + "\n", "utf-8"
    )
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def score_task(task: str, file: Path, options: argparse.Namespace, *, backbone: str, folder: Path) -> tuple:
    """Train and score one task with every seed: name, headline figures, second figures, file scored on, rows."""
    source = options.data_root / task
    first, second = [], []
    for place, seed in enumerate(int(seed) for seed in options.seeds.split(",")):
        path = folder / f"{task}-{seed}"
        result = sparse_ft.train(
            [str(file)], data=source, output=path, backbone=backbone, seed=seed, overrides=options.overrides
        )
        score = result.evaluation.tasks[task].score
        first.append(score.metrics[HEADLINE.get(task, "accuracy")])
        if task in SECOND:
            second.append(score.metrics[SECOND[task]])
        if options.submission is not None and place == 0 and task in SUBMISSIONS:
            try:
                written = write_submission(sparse_ft.load(path), task, data=source, output=options.submission)
                print(f"{task}: {written}", flush=True)
            except SparseFTError as error:
                print(f"{task}: nothing to hand in. {error}", flush=True)
    split = result.evaluation.splits[task]
    return task, first, second, getattr(result.tasks[task].files, split), score.n


def print_table(rows: list[tuple], *, note: str) -> None:
    print("\n| task | scored by | score | also | rows | backbone |\n|---|---|---:|---:|---:|---|")
    for task, first, second, file, number in rows:
        also = f"{SECOND[task]} {spread(second)}" if second else ""
        metric = HEADLINE.get(task, "accuracy")
        print(f"| {task} | {metric}, {file} | {spread(first)} | {also} | {number} | {note} |")
    means = [statistics.mean(first) for task, first, *_ in rows if task in COUNTED]
    if means:
        print(
            f"| CLUE's score | mean of {len(means)} of its 9 tasks | {100 * statistics.mean(means):.2f} | | | {note} |"
        )


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
