"""What a user can get wrong: exit code 2, what is wrong, what was expected, what to do, and nothing new on disk."""

import shlex
from pathlib import Path

import pytest
import yaml
from toy_checkpoints import disk, saved, saved_joint
from toys import call, quick, write_rows, write_toy

TRAIN = f"train --task mood.yaml --backbone {{bert}} {shlex.join(quick())}"
JOINT = f"{TRAIN} --task names.yaml --stage joint"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_model, tiny_bert):
    """Where the words in braces lead; nobody may change these folders."""
    return {
        "bert": tiny_bert,
        "saved": saved(tmp_path_factory.mktemp("saved"), make_model, "bert"),
        "mixed": saved_joint("sequence", tmp_path_factory.mktemp("mixed"), make_model),
    }


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, checkpoints):
    """Call the command line in a folder with two toy tasks; it must refuse, say why, and leave the disk as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("mood", "names"):
        write_toy(tmp_path, name, sizes=(8, 4, 4))

    def check(arguments: str, said: list[str]) -> None:
        before = disk(tmp_path)
        code, out, err = call(monkeypatch, capsys, *shlex.split(arguments.format(**checkpoints)))
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("Error: ")
        for part in said:
            assert part.format(**checkpoints) in last
        assert disk(tmp_path) == before

    return check


def change_task(**changes) -> None:
    path = Path("mood.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


# Options: the whole command, and what the last line says.


@pytest.mark.parametrize(("arguments", "said"), [
    ("tasks sentimant", ["'sentimant'", "Did you mean 'sentiment'?"]),
    ("train", ["No task", "--task ner", "`sparse-ft tasks`"]),
    ("train --stage joint", ["No task"]),
    ("train --task sentimant", ["'sentimant'", "Did you mean 'sentiment'?", "YAML"]),
    ("train --task no.yaml", ["no.yaml' does not exist"]),
    ("train --task conll2003", ["'lukasgarbas/conll-03'", "--data FOLDER"]),
    (f"{TRAIN} --task mood.yaml", ["mood, mood"]),
    (f"{TRAIN} --backbone minlm", ["'minlm'", "Did you mean 'minilm'?"]),
    (f"{TRAIN} --backbone ./nothing", ["'./nothing' does not exist", "config.json"]),
    (f"{TRAIN} --backbone mood", ["mood'", "config.json"]),
    (f"{TRAIN} --device gpu", ["'gpu'", "auto, cpu, cuda"]),
    (f"{TRAIN} --device cuda:99", ["'cuda:99'", "Present: cpu", "--device auto"]),
    (f"{TRAIN} --config fastt", ["'fastt'", "YAML file"]),
    (f"{TRAIN} --config no.yaml", ["'no.yaml'", "No such file"]),
    (f"{TRAIN} --set train.epochs", ["'train.epochs'", "section.key=value"]),
    (f"{TRAIN} --set train.epochs=x", ["train.epochs", "valid integer", "'x'"]),
    (f"{TRAIN} --set train.epoch=1", ["'train.epoch'", "Did you mean 'train.epochs'?"]),
    (f"{TRAIN} --set experts.first_block=9", ["experts.first_block is 9", "3 blocks", "0 to 2"]),
    (f"{TRAIN} --set experts.targets=[querry]", ["experts.targets", "'querry'", "Did you mean 'query'?"]),
    (f"{TRAIN} --set experts.pool=-1", ["experts.pool", "(got -1)"]),
    (f"{TRAIN} --set gate.jitter=1", ["gate.jitter", "(got 1)"]),
    (f"{TRAIN} --seed -1", ["seed", "(got -1)"]),
    (f"{TRAIN} --data nothing", ["nothing", "does not exist", "--data"]),
    (f"{TRAIN} --data names=mood", ["--data 'names'", "Known: mood"]),
    (f"{TRAIN} --data mood=mood --data mood=names", ["'mood'", "mood and names"]),
    (f"{TRAIN} --data mood=mood --data names", ["--data 'names'", "TASK=PATH"]),
    (f"{TRAIN} --task names.yaml --data mood", ["2: mood, names", "TASK=PATH"]),
    (f"{TRAIN} --output {{saved}}", ["holds a checkpoint already", "--output"]),
    (f"{TRAIN} --output mood", ["not empty", "--output"]),
    (f"{TRAIN} --output mood.yaml", ["mood.yaml' is a file", "--output"]),
    (f"{TRAIN} --output mood.yaml/out", ["mood.yaml", "is a file"]),
    (f"{TRAIN} --output out --resume", ["'out'", "--resume"]),
    (f"{TRAIN} --from mood", ["mood' holds no manifest.json"]),
    (f"{TRAIN} --from {{saved}} --set experts.frozen=[moood]", ["'moood'. Did you mean 'mood'?"]),
    (f"{TRAIN} --set experts.frozen=[mood]", ["'mood'", "--from"]),
    (f"{TRAIN} --set experts.shared=true", ["experts.shared", "--stage joint"]),
    (f"{TRAIN} --set gate.type=token", ["gate.type is token", "--stage joint"]),
    (f"{TRAIN} --stage joint", ["at least 2", "experts.pool"]),
    (f"{TRAIN} --set experts.pool=4 --set gate.top_k=5", ["gate.top_k is 5", "4 experts"]),
    (f"{JOINT} --set gate.type=prototype", ["prototype", "sequence or token"]),
    (f"{JOINT} --set gate.top_k=3", ["gate.top_k is 3", "2 experts"]),
    (f"{JOINT} --set gate.block=3", ["gate.block is 3", "0 to 2"]),
    (f"{JOINT} --set gate.shortlist=2", ["gate.shortlist", "gate.type is sequence"]),
    (f"{JOINT} --set gate.type=token --set gate.shortlist=1", ["gate.shortlist is 1", "gate.top_k=2"]),
    (f"{JOINT} --set gate.type=token --set gate.shortlist=3 --set gate.capacity=2", ["gate.capacity", "shortlist"]),
    (f"{JOINT} --set gate.type=token --set gate.min_confidence=0.1", ["gate.min_confidence"]),
    (f"{JOINT} --set experts.shared_a=true", ["experts.shared_a", "experts.pool"]),
    ("train --stage gate --from {saved} --set gate.type=token", ["token", "--stage joint"]),
    ("train --stage gate --from {mixed}", ["'mood'", "joint"]),
    (f"{TRAIN} --from {{mixed}} --stage experts", ["'mood'", "joint"]),
    (f"{TRAIN} --from {{mixed}} --stage joint", ["'about'", "--task {mixed}/tasks/about.yaml"]),
    ("edit {mixed} --remove mood --output out", ["'about'", "'mood'"]),
    ("edit {saved} --add {mixed} --output out", ["'mood'", "several experts"]),
    ("evaluate nothing", ["'nothing' does not exist"]),
    ("evaluate mood.yaml", ["'mood.yaml' is a file", "`sparse-ft train`"]),
    ("evaluate {saved} --split tset", ["'tset'", "Did you mean 'test'?", "Known: train"]),
    ("evaluate {saved} --route tsak", ["'tsak'", "Did you mean 'task'?"]),
    ("evaluate {saved} --task moood", ["'moood'", "Did you mean 'mood'?", "Known: mood, about"]),
    ("evaluate {saved} --device gpu", ["'gpu'"]),
    ("evaluate {saved} --task mood --data nothing", ["nothing", "does not exist"]),
    ("predict nothing text", ["'nothing' does not exist"]),
    ("predict {saved} text --file mood.yaml", ["--file"]),
    ("predict {saved} --file no.txt --task mood", ["'no.txt' does not exist"]),
    ("predict {saved} --file latin1.txt --task mood", ["Line 1 of 'latin1.txt' is not UTF-8"]),
    ("predict {saved} text --route hash", ["--route 'hash'", "YAML file with rules"]),
    ("predict {saved} text --route no.yaml", ["'no.yaml'"]),
    ("predict {saved} a --route r.yaml --task mood", ["--route 'r.yaml'"]),
    ("predict {saved} text --task moood", ["'moood'", "Did you mean 'mood'?"]),
    ("predict {saved} 'a\tb' --file mood.yaml", ["--file"]),
    ("inspect nothing", ["'nothing' does not exist"]),
    ("inspect mood", ["manifest.json"]),
    ("inspect {saved} --text Ada --route unifrom", ["'unifrom'", "Did you mean 'uniform'?"]),
    ("inspect {saved} --text Ada --route task", ["task"]),
    ("inspect {saved} --text Ada --picture ada.jpg", ["'ada.jpg'", ".png"]),
    ("inspect {saved} --text Ada --route arrow --picture mood.yaml/ada.png", ["mood.yaml is a file"]),
    ("inspect {saved} --picture ada.png", ["--picture", "--text TEXT"]),
    ("inspect {saved} --json", ["--json", "--text TEXT"]),
], ids=lambda value: value[-60:].replace("/", "_") if isinstance(value, str) else "")  # fmt: skip
def test_options(refused, arguments, said):
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    refused(arguments, said)


@pytest.mark.parametrize(("arguments", "said"), [
    ("train ner", ["'ner'", "train --task ner"]),
    ("train --task ./mod.yaml", ["'mod.yaml' does not exist. Did you mean 'mood.yaml'?"]),
    ("train --task mood", ["Unknown task 'mood'", "includes its ending: 'mood.yaml'"]),
    ("train --task mood.yaml", ["'mood' comes without data", "--data"]),
    ("train --task mood.yaml --set train.epoch=1", ["Did you mean 'train.epochs'?"]),
    ("train --task mood.yaml --data mod", ["--data 'mod' does not exist. Did you mean 'mood'?"]),
    ("predict moood text", ["'moood' does not exist. Did you mean 'mood'?"]),
    ("predict run/shop text", ["'run/shop' does not exist. Did you mean 'runs/shop'?"]),
    ("predict zzz text", ["'zzz' does not exist. Give the folder"]),
    ("predict mood --file mod.yaml", ["'mod.yaml' does not exist. Did you mean 'mood.yaml'?"]),
    ("evaluate moood", ["Did you mean 'mood'?"]),
], ids=str)  # fmt: skip
def test_names_are_checked_before_torch_is_loaded(monkeypatch, refused, arguments, said):
    for command in ("training.train.train", "prediction.loaded_model.load", "evaluation.evaluate.evaluate"):
        monkeypatch.setattr(f"sparse_ft.{command}", None)
    change_task(files={"format": "jsonl"})
    Path("runs/shop").mkdir(parents=True)
    refused(arguments, said)


@pytest.mark.parametrize("arguments", [
    "trian", "train --tsk ner", "train --stage gate", "train --seed x", "evaluate", "predict",
])  # fmt: skip
def test_a_command_that_cannot_be_parsed(monkeypatch, capsys, arguments):
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "Error" in err


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_scores_that_cannot_be_written(monkeypatch, capsys, tmp_path, checkpoints, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    arguments = ["evaluate", checkpoints["saved"], "--task", "mood", "--device", "cpu", option, "file/below"]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, "mood · test" in out) == (2, True)  # the scores are shown all the same
    assert "written" in err.splitlines()[-1]
    assert disk(tmp_path) == {str(tmp_path / "file"): b"kept"}


# Files: the readers' own tests have the rest.


@pytest.mark.parametrize(("changes", "said"), [
    ({"metrik": "f1"}, ["mood.yaml'", "'metrik'", "Did you mean 'metric'?"]),
    ({"kind": "clasification"}, ["Task 'mood'", "'clasification'", "Did you mean 'classification'?"]),
    ({"metric": "evaluate:./nothing"}, ["'evaluate:./nothing'"]),
    ({"columns": {"text": "txet", "label": "label"}}, ["'txet'", "train.jsonl', line 1", "Did you mean"]),
    ({"labels": ["good", "baad"]}, ["train.jsonl', line", "'bad'", "Did you mean 'baad'?"]),
    ({"name": "../evil"}, ["'../evil'"]),
    ({"files": None}, ["'mood'", "--data"]),
    ({"files": {"format": "jsonl", "root": "mood", "train": "no.jsonl"}}, ["no.jsonl' does not exist", "--data"]),
    ({"files": {"format": "jsonl", "root": "mood", "test": "test.jsonl"}}, ["'mood'", "--data"]),
])  # fmt: skip
def test_task_files(refused, changes, said):
    change_task(**changes)
    refused(TRAIN, said)


@pytest.mark.parametrize(("content", "said"), [
    ("train: {epoch: 1}", ["'train.epoch'", "Did you mean 'train.epochs'?"]),
    ("train: [", ["'run.yaml'", "YAML"]),
])  # fmt: skip
def test_config_files(refused, content, said):
    Path("run.yaml").write_text(content)
    refused(f"{TRAIN} --config run.yaml", said)


@pytest.mark.parametrize(("content", "said"), [
    ("", ["train.tsv'"]),
    ("text\tlabel\na\tgood\nb\tgood\n", ["['good']"]),
    ("text\tlabel\na\tgood\nb\tbad\tx\n", ["train.tsv', line 3", "2 columns", "3"]),
    ("text\tlabel\na\tgood\nb\t\n", ["line 3", "no label"]),
    ("text\tlabel\ncaf\u00e9\tgood\n".encode("latin-1"), ["not UTF-8: byte 14 is 0xe9"]),
])  # fmt: skip
def test_tables(refused, content, said):
    change_task(files={"format": "tsv", "root": "mood", "train": "train.tsv", "validation": "train.tsv"})
    Path("mood/train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(TRAIN, said)


@pytest.mark.parametrize(("row", "said"), [
    ({"tokens": ["a", "b"], "tags": ["O", "X-PER"]}, ["word 2", "'X-PER'", "'iob2'", "label_scheme"]),
    ({"tokens": ["a", "b"], "tags": ["O"]}, ["2 tokens but 1 tags"]),
    ({"tokens": ["a"], "tags": ["O"]}, ["'names'"]),
])  # fmt: skip
def test_tags(refused, row, said):
    write_rows(Path("names/train.jsonl"), [row])
    refused(TRAIN.replace("mood.yaml", "names.yaml"), said)
