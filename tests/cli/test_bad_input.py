"""What a user can get wrong: exit code 2, what is wrong, what was expected, what to do, and nothing new on disk."""

import json
from pathlib import Path

import pytest
import yaml
from toy_checkpoints import disk
from toys import call, quick, toy_rows, write_rows, write_toy

TRAIN = ["train", "--task", "mood.yaml", "--backbone", "{bert}", *quick()]
NER = ["train", "--task", "names.yaml", "--backbone", "{bert}", *quick()]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, tiny_bert, toys):
    """Call the command line in a folder with two toy tasks; it must refuse, say why, and leave the disk as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("mood", "names"):
        write_toy(tmp_path, name, sizes=(8, 4, 4))

    def check(arguments: list[str], *said: str) -> None:
        before = disk(tmp_path)
        filled = [str(argument).format(bert=tiny_bert, toys=toys) for argument in arguments]
        code, out, err = call(monkeypatch, capsys, *filled)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("Error: ")
        for part in said:
            assert part in last
        assert disk(tmp_path) == before

    return check


def change_task(**changes) -> None:
    path = Path("mood.yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def as_tsv(content: str | bytes, **changes) -> None:
    """Let the task read train from a TSV file."""
    change_task(files={"format": "tsv", "root": "mood", "train": "train.tsv", "validation": "train.tsv"}, **changes)
    Path("mood/train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())


# Options


@pytest.mark.parametrize(("arguments", "said"), [
    (["train", "--task", "sentimant"], ["Unknown task 'sentimant'", "Did you mean 'sentiment'?", "path of a YAML"]),
    (["train", "--task", "no.yaml"], ["no.yaml' does not exist", "bundled name"]),
    (["train"], ["No task is given", "--task ner", "`sparse-ft tasks` lists them"]),
    (["tasks", "sentimant"], ["Unknown task 'sentimant'", "Did you mean 'sentiment'?"]),
    ([*TRAIN, "--backbone", "minlm"], ["Unknown backbone 'minlm'", "Did you mean 'minilm'?", "Any folder with"]),
    ([*TRAIN, "--backbone", "./nothing"], ["Backbone folder './nothing' does not exist", "config.json"]),
    ([*TRAIN, "--backbone", "mood"], ["mood' has no readable config.json"]),
    ([*TRAIN, "--device", "gpu"], ["Unknown device 'gpu'", "Expected auto, cpu, cuda"]),
    ([*TRAIN, "--device", "cuda:99"], ["'cuda:99' is not available here", "Present: cpu", "Use --device auto"]),
    ([*TRAIN, "--config", "fastt"], ["Unknown config 'fastt'", "Or give the path of a YAML file"]),
    ([*TRAIN, "--config", "no.yaml"], ["Config file 'no.yaml' cannot be read: No such file"]),
    ([*TRAIN, "--set", "train.epochs"], ["'train.epochs' is not of the form section.key=value", "train.epochs=3"]),
    ([*TRAIN, "--set", "train.epochs=x"], ["train.epochs", "valid integer", "'x'"]),
    ([*TRAIN, "--set", "train.epoch=1"], ["Unknown key 'train.epoch'", "Did you mean 'train.epochs'?"]),
    ([*TRAIN, "--set", "experts.first_block=9"], ["experts.first_block is 9", "has 3 blocks", "Choose 0 to 2"]),
    ([*TRAIN, "--set", "experts.targets=[querry]"], ["experts.targets", "'querry'", "Did you mean 'query'?"]),
    ([*TRAIN, "--seed", "-1"], ["seed", "greater than or equal to 0 (got -1)"]),
    ([*TRAIN, "--data", "nothing"], ["nothing", "does not exist", "--data"]),
    ([*TRAIN, "--data", "names=mood"], ["Unknown task in --data 'names'", "Known: mood"]),
    ([*TRAIN, "--data", "mood=mood", "--data", "mood=names"], ["--data names task 'mood' twice: mood and names"]),
    ([*TRAIN, "--data", "mood=mood", "--data", "names"], ["--data 'names' names no task", "TASK=PATH"]),
    ([*TRAIN, "--task", "names.yaml", "--data", "mood"], ["names no task, but there are 2: mood, names", "TASK=PATH"]),
    ([*TRAIN, "--task", "mood.yaml"], ["Two tasks have the same name: mood, mood", "its own name"]),
    ([*TRAIN, "--output", "{toys}"], ["holds a checkpoint already", "Choose another --output"]),
    ([*TRAIN, "--output", "mood"], ["is not empty and no checkpoint", "Choose another --output"]),
    ([*TRAIN, "--output", "mood.yaml"], ["mood.yaml' is a file, not a folder", "Choose another --output"]),
    ([*TRAIN, "--output", "mood.yaml/out"], ["mood.yaml", "is a file, not a folder", "Choose another folder"]),
    ([*TRAIN, "--from", "mood"], ["mood' holds no manifest.json", "sparse-ft train"]),
    ([*TRAIN, "--output", "out", "--resume"], ["no unfinished run in 'out' to resume", "leave --resume out"]),
    (["train", "--task", "conll2003"], ["Data set 'lukasgarbas/conll-03' could not be loaded", "--data FOLDER"]),
    (["evaluate", "nothing"], ["Checkpoint folder 'nothing' does not exist"]),
    (["evaluate", "mood.yaml"], ["Checkpoint folder 'mood.yaml' does not exist"]),
    (["evaluate", "{toys}", "--split", "tset"], ["Unknown split 'tset'", "Did you mean 'test'?", "Known: train"]),
    (["evaluate", "{toys}", "--route", "tsak"], ["Unknown route 'tsak'", "Did you mean 'task'?"]),
    (["evaluate", "{toys}", "--task", "moood"], ["'moood'", "Did you mean 'mood'?", "Known: mood, reply"]),
    (["evaluate", "{toys}", "--device", "gpu"], ["Unknown device 'gpu'"]),
    (["evaluate", "{toys}", "--task", "mood", "--data", "nothing"], ["nothing", "does not exist"]),
    (["predict", "nothing", "text"], ["Checkpoint folder 'nothing' does not exist"]),
    (["predict", "{toys}", "text", "--file", "mood.yaml"], ["Texts and --file are both given", "Choose one"]),
    (["predict", "{toys}", "--file", "no.txt", "--task", "mood"], ["File 'no.txt' does not exist", "one text a line"]),
    (["predict", "{toys}", "text", "--route", "hash"], ["--route 'hash' is not for predict", "YAML file with rules"]),
    (["predict", "{toys}", "text", "--route", "no.yaml"], ["Rules file 'no.yaml' cannot be read"]),
    (["predict", "{toys}", "a", "--route", "r.yaml", "--task", "mood"], ["--route 'r.yaml' chooses", "Leave one out"]),
    (["predict", "{toys}", "text", "--task", "moood"], ["'moood'", "Did you mean 'mood'?"]),
    (["inspect", "nothing"], ["Checkpoint folder 'nothing' does not exist"]),
    (["inspect", "mood"], ["holds no manifest.json", "no checkpoint"]),
], ids=lambda value: " ".join(value)[:60].replace("/", "_") if isinstance(value, list) else None)  # fmt: skip
def test_options(refused, arguments, said):
    refused(arguments, *said)


JOINT = [*TRAIN, "--task", "names.yaml", "--stage", "joint"]
POOL = ["--set", "experts.pool=4"]


def sets(*changes):
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.parametrize(("arguments", "said"), [
    ([*TRAIN, *sets("gate.type=token")], ["gate.type is token", "use --stage joint"]),
    ([*TRAIN, "--from", "{toys}", *sets("gate.type=token")], ["gate.type is token", "use --stage joint"]),
    (["train", "--stage", "gate", "--from", "{toys}", *sets("gate.type=token")], ["token", "use --stage joint"]),
    ([*JOINT, *sets("gate.type=prototype")], ["prototype, which learns nothing", "takes sequence or token"]),
    ([*TRAIN, "--stage", "joint"], ["mixes at least 2 experts, and here is 1", "set experts.pool"]),
    ([*JOINT, *sets("gate.top_k=3")], ["gate.top_k is 3, but there are 2 experts", "Lower it"]),
    ([*TRAIN, *POOL, *sets("gate.top_k=5")], ["gate.top_k is 5, but there are 4 experts"]),
    ([*TRAIN, *POOL, *sets("gate.type=token", "gate.shortlist=1")], ["gate.shortlist is 1", "gate.top_k=2"]),
    ([*TRAIN, *POOL, *sets("gate.type=token", "gate.shortlist=3", "gate.capacity=2")], ["gate.capacity", "shortlist"]),
    ([*JOINT, *sets("experts.shared_a=true")], ["experts.shared_a needs a pool", "set experts.pool"]),
    ([*TRAIN, *sets("experts.shared=true")], ["experts.shared is for experts that are trained", "--stage joint"]),
    ([*JOINT, *sets("gate.shortlist=2")], ["gate.shortlist is for tokens, but gate.type is sequence"]),
    ([*JOINT, *sets("gate.type=token", "gate.min_confidence=0.1")], ["gate.min_confidence turns away whole texts"]),
    ([*TRAIN, *sets("experts.frozen=[mood]")], ["'mood' has not been trained", "to start --from"]),
    ([*TRAIN, "--from", "{toys}", *sets("experts.frozen=[moood]")], ["Unknown expert 'moood'. Did you mean 'mood'?"]),
    ([*JOINT, *sets("gate.block=3")], ["gate.block is 3, but the blocks are 0 to 2"]),
    ([*TRAIN, *sets("experts.pool=-1")], ["experts.pool", "greater than or equal to 0 (got -1)"]),
    ([*TRAIN, *sets("gate.jitter=1")], ["gate.jitter", "less than 1 (got 1)"]),
    (["train", "--stage", "joint"], ["No task is given"]),
    (["train", "--stage", "joint", "--from", "mood"], ["mood' holds no manifest.json"]),
    (["train", "--stage", "gate", "--from", "{mixed}"], ["'mood'", "trained together with the gate", "joint"]),
    ([*TRAIN, "--from", "{mixed}", "--stage", "experts"], ["'mood'", "trained together with its gate", "joint"]),
    ([*TRAIN, "--from", "{mixed}", "--stage", "joint"], ["'about'", "would change", "--task {mixed}/tasks/about.yaml"]),
    (["edit", "{mixed}", "--remove", "mood", "--output", "out"], ["'about'", "the gate mixing 'mood' in"]),
    (["edit", "{toys}", "--add", "{mixed}", "--output", "out"], ["'mood'", "mixing several experts", "anew"]),
], ids=lambda value: " ".join(value[-4:])[:60].replace("/", "_") if isinstance(value, list) else None)  # fmt: skip
def test_joint_runs(refused, arguments, said, joint_toys):
    mixed = str(joint_toys("sequence"))
    filled = [argument.replace("{mixed}", mixed) for argument in arguments]
    refused(filled, *(part.replace("{mixed}", mixed) for part in said))


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_scores_that_cannot_be_written(monkeypatch, capsys, tmp_path, toys, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    arguments = ["evaluate", toys, "--task", "mood", "--device", "cpu", option, "file/below"]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, "mood · test" in out) == (2, True)  # the scores are shown all the same
    assert "written" in err.splitlines()[-1]
    assert disk(tmp_path) == {str(tmp_path / "file"): b"kept"}


# Task and config files


@pytest.mark.parametrize(("changes", "said"), [
    ({"metrik": "f1"}, ["mood.yaml'", "Unknown key 'metrik'", "Did you mean 'metric'?"]),
    ({"kind": "clasification"}, ["'mood'", "Unknown kind 'clasification'", "Did you mean 'classification'?"]),
    ({"metric": "acuracy"}, ["Unknown metric", "'acuracy'", "accuracy"]),
    ({"metric": "evaluate:./nothing"}, ["Metric 'evaluate:./nothing' could not be loaded"]),
    ({"columns": {"text": "txet", "label": "label"}}, ["No column 'txet'", "train.jsonl', line 1", "Did you mean"]),
    ({"columns": {"text": "text", "label": "lable"}}, ["No column 'lable'", "Did you mean 'label'?"]),
    ({"labels": ["good", "baad"]}, ["train.jsonl', line", "Unknown label 'bad'", "Did you mean 'baad'?"]),
    ({"name": "../evil"}, ["The name '../evil' is not allowed", "use letters, digits"]),
    ({"files": None}, ["'mood' comes without data", "--data"]),
    ({"files": {"format": "docx"}}, ["files.format", "'docx'", "'jsonl'"]),
    ({"files": {"format": "jsonl", "root": "mood", "train": "no.jsonl"}}, ["no.jsonl' does not exist", "--data"]),
    ({"files": {"format": "jsonl", "root": "mood", "test": "test.jsonl"}}, ["'mood' has no training rows", "--data"]),
])  # fmt: skip
def test_task_files(refused, changes, said):
    change_task(**changes)
    refused(TRAIN, *said)


@pytest.mark.parametrize(("content", "said"), [
    ("train: {epoch: 1}", ["Unknown key 'train.epoch'", "Did you mean 'train.epochs'?"]),
    ("trian: {epochs: 1}", ["Unknown key 'trian'", "Did you mean 'train'?"]),
    ("train: {clip: many}", ["train.clip", "valid number", "'many'"]),
    ("train: [", ["'run.yaml' is not readable YAML"]),
    ("- train", ["'run.yaml' must hold a mapping of keys, not list"]),
])  # fmt: skip
def test_config_files(refused, content, said):
    Path("run.yaml").write_text(content)
    refused([*TRAIN, "--config", "run.yaml"], *said)


# Data files


@pytest.mark.parametrize(("content", "said"), [
    ("", ["train.tsv' has no rows", "Expected at least one"]),
    ("text\tlabel\n", ["train.tsv' has no rows"]),
    ("text\tlabel\na\tgood\nb\tgood\n", ["one class only: ['good']", "at least two"]),
    ("text\tlabel\na\tgood\nb\tbad\tx\n", ["train.tsv', line 3: expected 2 columns", "found 3", "Correct the line"]),
    ("text\tlabel\na\tgood\nb\n", ["line 3: expected 2 columns as in the first line, found 1"]),
    ("text\tlabel\na\tgood\nb\t\n", ["line 3: a row of train has no label", "Label it or leave it out"]),
    ("text\ttext\na\tgood\n", ["names column 'text' twice", "its own name"]),
    ("txt\tlabel\na\tgood\n", ["No column 'text'", "Did you mean 'txt'?", "`columns`"]),
    ("text\tlabel\ncaf\u00e9\tgood\n".encode("latin-1"), ["is not UTF-8: byte 14 is 0xe9", "Convert the file"]),
])  # fmt: skip
def test_tables(refused, content, said):
    as_tsv(content)
    refused(TRAIN, *said)


@pytest.mark.parametrize(("line", "said"), [
    ('{"text": "a", "label": ', ["train.jsonl', line 2: broken JSON at column", "Expected one object a line"]),
    ('"text"', ["train.jsonl', row 2: expected a JSON object or list, found 'text'"]),
    ('{"text": null, "label": "bad"}', ["line 2: text is null", "leave the row out"]),
    ('{"label": "bad"}', ["No column 'text' in", "line 2"]),
])  # fmt: skip
def test_json_lines(refused, line, said):
    first = json.dumps(toy_rows("mood", 1)[0])
    Path("mood/train.jsonl").write_text(f"{first}\n{line}\n")
    refused(TRAIN, *said)


@pytest.mark.parametrize(("row", "said"), [
    ({"tokens": ["a", "b"], "tags": ["O", "X-PER"]}, ["word 2: tag 'X-PER' is not valid", "'iob2'", "label_scheme"]),
    ({"tokens": ["a", "b"], "tags": ["O", "S-PER"]}, ["tag 'S-PER' is not valid", "iob1, iob2, bioes, bmes"]),
    ({"tokens": ["a", "b"], "tags": ["O"]}, ["2 tokens but 1 tags", "Give one tag a token"]),
    ({"tokens": ["a"], "tags": ["O"]}, ["'names' has no label at all", "label_scheme"]),
])  # fmt: skip
def test_tags(refused, row, said):
    write_rows(Path("names/train.jsonl"), [row])
    refused(NER, *said)


def test_texts_that_are_not_utf8(refused):
    Path("texts.txt").write_bytes(b"caf\xe9\n")
    refused(["predict", "{toys}", "--task", "mood", "--file", "texts.txt"], "Line 1 of 'texts.txt' is not UTF-8")


def test_pairs_and_single_texts_do_not_mix(refused):
    refused(["predict", "{toys}", "a text", "--task", "all"], "Task 'reply' reads two texts a row, got one: 'a text'")
