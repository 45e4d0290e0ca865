"""CLUE for benchmark.py: its tasks in the files that are there, and its way to score.

Data lies in one folder a task (afqmc/, tnews/ …), with the files as CLUE ships them, or as FewCLUE does. A task is
scored on test where that has answers, else on validation, which then also chose the best epoch.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_ft.evaluation.scoring import predict_rows
from sparse_ft.prediction.loaded_model import LoadedModel
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.kinds.scores import Score
from sparse_ft.tasks.reading import read
from sparse_ft.tasks.schemes import spans_from_tags
from sparse_ft.tasks.spec import load_task, task_path

TASKS = ["afqmc", "tnews", "iflytek", "ocnli", "cluewsc", "csl", "cmrc2018", "chid", "c3", "cmnli", "drcd", "cluener"]
COUNTED = TASKS[:9]
"""Of CLUE 1.1's score, which is the mean over them: of accuracy, and of exact match on CMRC 2018."""
HEADLINES = {"cmrc2018": "exact_match", "drcd": "exact_match", "cluener": "macro_f1_of_texts"}
ALSO = {"cmrc2018": ["answer_f1"], "drcd": ["answer_f1"], "cluener": ["micro_f1_of_texts", "f1"]}
LIMITS = {"chid": 20_000}
"""Training rows where data.train_limit says nothing: all 577,157 blanks of ChID take more memory than most have."""
NOTES = {
    "minilm": "English backbone: says nothing of quality on Chinese",
    "random-chars": "random weights: says nothing of quality",
}
CHARACTERS = 6000


def task_file(task: str, root: Path, scratch: Path) -> Path | None:
    """Write a task file that names the files which are there; None if its training or validation rows are not.

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
    names = [name for split in ("train", "validation") for name in _listed(files[split])]
    return path if all(is_there(root / task, name) for name in names) else None


def _listed(names: str | list[str]) -> list[str]:
    return names if isinstance(names, list) else [names]


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


def view(model: LoadedModel, task: str, split: str, *, score: Score, source: Path, limit: int | None) -> dict[str, Any]:
    """Return the entries of a run that are otherwise in CLUE: how a task is scored, on what, and whether it counts."""
    metrics = dict(score.metrics)
    if task == "cluener":
        metrics |= scores_of_texts(model, split, source)
    file = getattr(model.tasks[task].files, split)
    bound = f", trained on {limit:,} at most" if limit else ""
    return {
        "metrics": metrics,
        "metric": HEADLINES.get(task, model.tasks[task].metric),
        "also": {name: metrics[name] for name in ALSO.get(task, [])},
        "scored_on": f"{file}, {score.n:,} rows{bound}",
        "counted": task in COUNTED,
    }


def scores_of_texts(model: LoadedModel, split: str, source: Path) -> dict[str, float]:
    """Score CLUENER as CLUE does: which texts of which type a sentence holds, however often and wherever.

    https://github.com/CLUEbenchmark/CLUENER2020/blob/a532068e276f539b541659eab5fe4ba359f7a737/score.py compares
    sets, and CLUE averages F1 over the types.
    """
    spec = model.tasks["cluener"]
    data = encode_rows(read(spec, data=source, splits=[split])[split].to_dict(), spec=spec, encoder=model.encoder)
    predicted: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    both: Counter[str] = Counter()
    predictions = predict_rows(model.checkpoint.model, spec, data)
    for tokens, own, tags in zip(data.columns["tokens"], data.columns["tags"], predictions, strict=True):
        right, said = (
            {(span.type, "".join(tokens[span.start : span.end])) for span in spans_from_tags(row)}
            for row in (own, tags)
        )
        for counts, spans in ((gold, right), (predicted, said), (both, right & said)):
            counts.update(kind for kind, _ in spans)
    by_type = [2 * both[name] / max(1, gold[name] + predicted[name]) for name in spec.label_names or []]
    return {
        "macro_f1_of_texts": sum(by_type) / len(by_type),
        "micro_f1_of_texts": 2 * both.total() / max(1, gold.total() + predicted.total()),
    }
