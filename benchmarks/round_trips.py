"""Export a checkpoint to every format and compare each with it: logits, labels, size, speed.

    python benchmarks/round_trips.py --data-root DATA
    python benchmarks/round_trips.py --data-root DATA --checkpoint runs/conll2003 --checkpoint runs/clinc150

Takes the first task of each checkpoint. Without one, trains an expert for CoNLL-2003 without word shapes, one with, and
one for CLINC150, each on few rows (--train-rows): how good they are matters only to the form with eight bits.
Rows are the first of test (--rows), by length; tagging takes the given words.
Labels are compared tag by tag, before the legal sequence is sought; those of the transformers form are its pipeline's.
Time is that of tokenizing and running some of the rows (--timed), the forms taking turns; batches are 16 rows in all
forms but the checkpoint's own, which has its own. ONNX runs with as many threads as torch.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from peft import AutoPeftModelForTokenClassification
from script import run as run_script
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from sparse_ft.backbone.backbone import load_backbone
from sparse_ft.experts.inference import row_logits
from sparse_ft.integrations.export import export
from sparse_ft.integrations.exporters.int8 import INT8_GRAPH
from sparse_ft.integrations.exporters.onnx_folder import GRAPH, TASKS, read_tasks, runner
from sparse_ft.integrations.exporters.parts import sees_shapes
from sparse_ft.integrations.exporters.peft_folder import peft_logits
from sparse_ft.integrations.import_peft import import_adapter
from sparse_ft.integrations.round_trip import foreign_logits
from sparse_ft.prediction.loaded_model import LoadedModel, load
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.tasks.reading import read
from sparse_ft.training.train import train

RUNS = (("conll2003", False), ("conll2003", True), ("clinc150", False))
Side = Callable[[list[Any]], list[torch.Tensor]]


def own_side(model: LoadedModel, task: str) -> Side:
    spec = model.tasks[task]
    kind = find_kind(spec.kind)

    def run(rows):
        words = [len(row) for row in rows] if kind.level == "word" else None
        columns = {"tokens" if words else "text": rows}
        examples = kind.encode(columns, encoder=model.encoder, labels=spec.label_names, language=spec.language)
        return row_logits(model.checkpoint.model, task, examples, num_rows=len(rows), num_parts=words)

    return run


def foreign_side(model: LoadedModel, task: str, run, tokenizer) -> Side:
    def logits(rows):
        results = foreign_logits(rows, spec=model.tasks[task], encoder=model.encoder, run=run, tokenizer=tokenizer)
        assert len(results) == len(rows)
        return list(results.values())

    return logits


def torch_side(model: LoadedModel, task: str, theirs, folder: Path, *, pooled: bool) -> Side:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    known = set(tokenizer("a"))  # word shapes only of a tokenizer that knows them

    def run(batch):
        own = {name: value for name, value in batch.items() if name in known}
        pooling = model.checkpoint.model.pooling if pooled else None
        return peft_logits(theirs, own, head="classifier", pooling=pooling)

    return foreign_side(model, task, run, tokenizer)


def onnx_side(model: LoadedModel, task: str, folder: Path, name: str) -> Side:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    run = runner(session, task, read_tasks(folder))
    return foreign_side(model, task, run, AutoTokenizer.from_pretrained(folder))


def pipeline_labels(folder: Path, rows, *, words: bool) -> list[Any]:
    if not words:
        classify = pipeline("text-classification", model=str(folder), trust_remote_code=True)
        return [answer["label"] for answer in classify(rows, truncation=True, batch_size=16)]
    tag = pipeline("token-classification", model=str(folder), trust_remote_code=True)
    results = []
    for row in rows:
        (pieces,) = tag([row], is_split_into_words=True, ignore_labels=[])
        starts = {sum(len(word) + 1 for word in row[:place]): place for place in range(len(row))}
        tags = {}
        for piece in pieces:
            place = starts.get(piece["start"])
            if place is not None:
                tags.setdefault(place, piece["entity"])
        results.append([tags[place] for place in range(len(row))])
    return results


def megabytes(*paths: Path) -> float:
    return sum(file.stat().st_size for path in paths for file in (path.rglob("*") if path.is_dir() else [path])) / 1e6


def sides_of(model: LoadedModel, task: str, folder: Path) -> dict[str, tuple[Side, float]]:
    """Export to every format that can, load each as its user would, and return how it runs and its megabytes."""
    words = find_kind(model.tasks[task].kind).level == "word"
    outputs = len(find_kind(model.tasks[task].kind).outputs(model.tasks[task].label_names))
    sides = {"checkpoint": (own_side(model, task), megabytes(model.checkpoint.path))}
    if not sees_shapes(model, task):
        path = export(model, format="peft", output=folder / "peft").path
        base = load_backbone("minilm").folder
        config = path / "adapter_config.json"  # names the hub, which this machine may not reach
        config.write_text(config.read_text().replace("sentence-transformers/all-MiniLM-L6-v2", str(base)))
        wrapped = AutoPeftModelForTokenClassification.from_pretrained(path, num_labels=outputs).eval()
        sides["peft"] = torch_side(model, task, wrapped, path, pooled=not words), megabytes(path)
        again = import_adapter(path, backbone="minilm", output=folder / "imported")
        loaded = load(again.path, device="cpu")
        sides["peft, imported"] = own_side(loaded, task), megabytes(again.path)
    path = export(model, format="transformers", output=folder / "transformers").path
    auto = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
    dense = auto.from_pretrained(path, trust_remote_code=True).eval()
    sides["transformers"] = torch_side(model, task, dense, path, pooled=False), megabytes(path)
    result = export(model, format="onnx", int8=True, output=folder / "onnx")
    for scores in result.int8.values():
        print(f"int8, {task}: {scores}", flush=True)
    for name, graph in (("onnx", GRAPH), ("onnx int8", INT8_GRAPH)):
        sides[name] = onnx_side(model, task, result.path, graph), megabytes(result.path / graph)
    assert (result.path / TASKS).is_file()
    return sides


def checkpoints(options: argparse.Namespace) -> Iterator[Path]:
    """Give the checkpoints that were named, or train some."""
    yield from options.checkpoint
    for task, shapes in () if options.checkpoint else RUNS:
        settings = [f"data.train_limit={options.train_rows}", f"experts.word_shapes={str(shapes).lower()}"]
        settings += ["train.epochs=1", "train.min_steps=0", "train.precision=fp32"]
        with tempfile.TemporaryDirectory() as made:
            data = options.data_root / task
            yield train([task], data=data, output=Path(made) / "run", overrides=settings, seed=13, device="cpu").path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=200)
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [
        "| task | form | largest difference of a logit | labels equal | MB | time / checkpoint |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for checkpoint in checkpoints(options):
        model = load(checkpoint, device="cpu")
        task, spec = next(iter(model.tasks.items()))
        shapes = sees_shapes(model, task)
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            columns = read(spec, data=options.data_root / task, splits=["test"])["test"].to_dict()
            rows = sorted(
                columns["tokens" if "tokens" in columns else "text"][: options.rows], key=lambda row: len(str(row))
            )
            sides = sides_of(model, task, folder)
            expected = sides["checkpoint"][0](rows)
            best = [row.argmax(-1) for row in expected]
            timed = rows[:: max(1, len(rows) // options.timed)]
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(options.rounds):
                for name, (run, _) in sides.items():
                    started = time.perf_counter()
                    run(timed)
                    seconds[name].append(time.perf_counter() - started)
            for name, (run, size) in sides.items():
                results = run(rows)
                largest = max(float((one - other).abs().max()) for one, other in zip(expected, results, strict=True))
                labels = [row.argmax(-1) for row in results]
                if name == "transformers":
                    names = find_kind(spec.kind).outputs(spec.label_names)
                    answers = pipeline_labels(folder / "transformers", rows, words="tokens" in columns)
                    labels = [
                        torch.tensor([names.index(one) for one in row] if isinstance(row, list) else names.index(row))
                        for row in answers
                    ]
                equal = sum(int((one == other).sum()) for one, other in zip(best, labels, strict=True))
                total = sum(row.numel() for row in best)
                ratios = [one / own for one, own in zip(seconds[name], seconds["checkpoint"], strict=True)]
                about = f"{task}{', word shapes' if shapes else ''} | {name} | {largest:.1e} | {equal:,} of {total:,}"
                table.append(f"| {about} | {size:.1f} | {statistics.median(ratios):.2f} |")
                print(table[-1], flush=True)
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    run_script(main)
