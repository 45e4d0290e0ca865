"""Every command, through ``main`` as the console script calls it."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from toys import call, quick, toy_rows, write_rows, write_toy

import sparse_ft
from sparse_ft.cli.train import _print_result
from sparse_ft.evaluation.token_routing import route_tokens
from sparse_ft.training import loop

COMMANDS = ("tasks", "train", "evaluate", "predict", "inspect", "edit", "merge", "export", "import")
TEXTS = ["Ada in London", "", "the table\tloved 😀", "a\u2028b"]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Call the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def next_command(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("Next: sparse-ft ")]
    return shlex.split(line.removeprefix("Next: sparse-ft "))


def test_help_lists_all_commands_and_loads_no_torch():
    script = "import sys; sys.argv = ['sparse-ft', '-h']\nfrom sparse_ft.cli.main import main\ntry:\n    main()\n" \
        "finally:\n    print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^\s+{command}\s", done.stdout, re.MULTILINE) for command in COMMANDS)
    assert done.stdout.rstrip().endswith("False")


def test_every_command_has_help(cli):
    for command in COMMANDS:
        code, out, _ = cli(command, "-h")
        assert code == 0
        assert f"sparse-ft {command}" in out


def test_version(cli):
    assert cli("--version") == (0, f"sparse-ft {sparse_ft.__version__}\n", "")


def test_tasks(cli):
    code, out, err = cli("tasks")
    assert (code, err) == (0, "")
    assert "conll2003" in out
    code, out, err = cli("tasks", "ner")
    assert (code, err) == (0, "")
    assert "PER, ORG, LOC, MISC" in out


# Train and evaluate


def test_train_predict_evaluate_inspect(cli, tmp_path, tiny_bert):
    """The way of a newcomer: a bundled sample, then the command that train printed."""
    code, out, err = cli("train", "--task", "sentiment", "--backbone", tiny_bert, *quick(data__train_limit=32))
    assert code == 0, err
    assert "sentiment · test" in out
    assert "Checkpoint: runs/sentiment" in out
    assert "training" in err
    assert "training:" not in out
    code, out, err = cli(*next_command(out))
    assert code == 0, err
    assert out.splitlines()[0] == "The zip broke on the second day."
    assert re.fullmatch(r"  sentiment  (negative|positive) \([01]\.\d\d\)", out.splitlines()[1])
    code, out, err = cli("evaluate", "runs/sentiment", "--json", "scores.json", "--report", "report", "--device", "cpu")
    assert code == 0, err
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["tasks"]["sentiment"]["n"] >= 100
    accuracy = f"accuracy {content['tasks']['sentiment']['metrics']['accuracy']:.3f}"
    assert accuracy in out
    files = ["confusion_sentiment.png", "report.json", "report.md", "report.txt"]
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == files
    assert json.loads((tmp_path / "report/report.json").read_text())["tasks"] == content["tasks"]
    code, out, err = cli("inspect", "runs/sentiment")
    assert (code, err) == (0, "")
    assert accuracy in out


@pytest.mark.parametrize(("tasks", "example"), [
    (["mood"], "-5 degrees, it's \"cold\" $HOME"),
    (["reply"], None),
    (["reply"], ""),
    (["names"], ""),
    (["mood", "reply"], None),
])  # fmt: skip
def test_the_printed_next_command_runs(cli, capsys, tmp_path, toys, tasks, example):
    shutil.copytree(toys, tmp_path / "my runs/it's here")
    specs = {name: sparse_ft.load(toys, device="cpu").tasks[name] for name in tasks}
    if example is not None:
        specs = {name: spec.model_copy(update={"example": example}) for name, spec in specs.items()}
    result = SimpleNamespace(path=Path("my runs/it's here"), tasks=specs, history=[], folds={})
    result.evaluation = SimpleNamespace(tasks=tasks, to_text=lambda: "scores")
    _print_result(result, starts_from_checkpoint=False)
    code, answer, err = cli(*next_command(capsys.readouterr().out))
    assert code == 0, err
    assert answer.startswith(example or "")
    assert (f"  {tasks[0]}  " in answer) or len(tasks) == 1  # among tasks that read different rows one is named


def test_config_set_data_and_from(cli, tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "about")]
    write_rows(tmp_path / "all.jsonl", toy_rows("mood", 40))
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"other/{split}.jsonl", toy_rows("about", 16, seed=4))
    (tmp_path / "run.yaml").write_text("train: {epochs: 7, min_steps: 0, batch_size: 8}\nseed: 3\n")
    code, out, err = cli(
        "train", "--task", tasks[0], "--task", tasks[1], "--data", "mood=all.jsonl", "--data", "about=other",
        "--config", "run.yaml", "--set", "train.epochs=1", "--seed", 5, "--backbone", tiny_bert, "--output", "first",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "32 for train, 4 for validation and 4 for test" in err
    assert "mood · test (4 rows)" in out
    assert "about · test (16 rows)" in out
    config = sparse_ft.load("first", device="cpu").checkpoint.config
    assert (config.train.epochs, config.train.batch_size, config.seed) == (1, 8, 5)
    names = write_toy(tmp_path, "names", sizes=(8, 4, 4))
    code, _, err = cli("train", "--task", names, "--from", "first", "--output", "second", *quick())
    assert code == 0, err
    assert list(sparse_ft.load("second", device="cpu").tasks) == ["mood", "about", "names"]
    code, out, err = cli("evaluate", "second", "--task", "about", "--data", "other", "--split", "train")
    assert code == 0, err
    assert "about · train (16 rows)" in out


def stopping(save):
    """Save, and press Ctrl-C."""

    def stop(run):
        save(run)
        raise KeyboardInterrupt

    return stop


def test_an_interrupted_run_is_resumed_from_another_folder_as_it_advises(cli, tmp_path, tiny_bert, monkeypatch):
    """The paths of a config hold in every folder, also those that the checkpoint keeps for evaluate."""
    files = {"format": "jsonl", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    write_toy(tmp_path, "mood", sizes=(8, 4, 4), files=files)
    (tmp_path / "bert").symlink_to(tiny_bert)
    run = {"tasks": ["mood.yaml"], "backbone": "bert", "sources": {"mood": "mood"}, "output": "out"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "save", stopping(loop._Loop.save))
        assert cli("train", "--config", "run.yaml", *quick())[0] == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = cli("predict", "../out", "text")
    assert code == 2
    (advised,) = re.findall(r"`sparse-ft (.*?)`", err)
    for command in (shlex.split(advised), ["evaluate", "../out"]):
        code, _, err = cli(*command)
        assert code == 0, err


def test_evaluate_writes_the_json_of_the_python_function(cli, toys):
    code, _, err = cli("evaluate", toys, "--task", "names", "--task", "mood", "--json", "deep/scores.json")
    assert code == 0, err
    expected = sparse_ft.evaluate(toys, tasks=["names", "mood"]).to_dict()
    assert json.loads(Path("deep/scores.json").read_text()) == expected
    assert set(expected) == {"checkpoint", "split", "route", "tasks", "routing"}


def test_the_report_shows_what_the_route_did(cli, toys, tmp_path):
    code, _, err = cli("evaluate", toys, "--route", "arrow", "--report", "report", "--device", "cpu")
    assert code == 0, err
    names = {file.name for file in (tmp_path / "report").glob("*.png")}
    assert names == {"confusion_mood.png", "confusion_reply.png", "routing.png", "routing_blocks.png"}
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert list(content["routing"]["blocks"]) == ["0", "1", "2"]
    markdown = (tmp_path / "report/report.md").read_text()
    assert all(f"]({name})" in markdown for name in names)


def test_without_matplotlib_there_are_no_pictures_and_it_is_said_how_to_get_them(cli, toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("evaluate", toys, "--task", "mood", "--report", "report", "--device", "cpu")
    assert code == 0
    assert 'pip install "sparse-ft[plots]"' in err
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["report.json", "report.md", "report.txt"]
    code, out, err = cli("inspect", toys, "--text", "Ada", "--picture", "ada.png")
    assert (code, out) == (2, "")
    assert "pip install" in err
    assert cli("inspect", toys, "--text", "Ada")[0] == 0


def test_inspect_a_text(cli, toys, tmp_path):
    code, out, err = cli("inspect", toys, "--text", "Ada in London", "--route", "arrow", "--picture", "new/ada.png")
    assert (code, err) == (0, "")
    assert out.startswith("Route arrow: each token has its own experts in each block (7 tokens, blocks 0 to 2).")
    assert out.endswith("\nPicture: new/ada.png\n")
    assert (tmp_path / "new/ada.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("inspect", toys, "--text", "Ada in London", "--route", "arrow", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == route_tokens(toys, "Ada in London", route="arrow", device="cpu").to_dict()
    code, out, err = cli("inspect", toys, "--text", "")
    assert (code, err) == (0, "")
    assert out.startswith("Route gate: ")


# Predict


def test_predict_from_arguments_file_and_stdin(cli, toys, tmp_path, monkeypatch):
    expected = sparse_ft.load(toys).predict(TEXTS, ["mood", "names"])
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (tmp_path / "windows.txt").write_bytes(("\ufeff" + "\r\n".join(TEXTS)).encode())
    for arguments in ([*TEXTS], ["--file", "texts.txt"], ["--file", "windows.txt"], ["--file", "-"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode() + b"\n")))
        code, out, err = cli("predict", toys, *arguments, "--task", "mood", "--task", "names", "--json")
        assert (code, err) == (0, "")
        lines = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
        assert [line["text"] for line in lines] == TEXTS
        for line, answer in zip(lines, expected, strict=True):
            assert list(line) == ["text", "tasks", "routing"]
            assert line["tasks"]["mood"]["label"] == answer.tasks["mood"]["label"]
            assert line["tasks"]["names"] == answer.to_dict()["tasks"]["names"]


def test_predict_for_people(cli, toys, tmp_path):
    code, out, err = cli("predict", toys, "Ada in London", "half", "--task", "mood")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [lines[0], lines[2]] == ["Ada in London", "half"]
    assert re.fullmatch(r"  mood  (good|bad) \([01]\.\d\d\)", lines[1])
    code, out, _ = cli("predict", toys, "Ada in London", "--task", "mood", "--task", "names")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["mood", "names"]
    (tmp_path / "empty.txt").write_text("")
    assert cli("predict", toys, "--file", "empty.txt", "--task", "mood") == (0, "", "")


def test_predict_pairs(cli, toys):
    code, out, err = cli("predict", toys, "the table\thalf loved", "--task", "reply", "--json")
    assert (code, err) == (0, "")
    line = json.loads(out)
    assert (line["text"], line["text_pair"]) == ("the table", "half loved")


def test_predict_rows_with_tasks_of_their_own_and_rules(cli, toys, tmp_path):
    rows = [
        {"text": "the table loved", "tasks": ["mood"]},
        {"text": "Ada in London", "tasks": ["names", "about"]},
        {"text": "half boring", "metadata": {"channel": "mail"}},
        {"text": "Ada met Mozart"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    rules = "- {metadata: {channel: mail}, expert: about}\n- {contains: [zebra], expert: mood}\n"
    (tmp_path / "rules.yaml").write_text(rules)
    code, out, err = cli("predict", toys, "--file", "rows.jsonl", "--route", "rules.yaml", "--json")
    assert (code, err) == (0, "Rule 2 of rules.yaml never matched.\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [list(line["tasks"]) for line in lines] == [["mood"], ["names", "about"], ["about"], []]
    assert [line.get("unknown", False) for line in lines] == [False, False, False, True]
    shown = cli("predict", toys, "Ada met Mozart", "--route", "rules.yaml")[1]
    assert shown == "Ada met Mozart\n  unknown: no expert is for such a text\n"
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write("\n  \n")  # blank lines say nothing, and count
    assert cli("predict", toys, "--file", "rows.jsonl", "--route", "rules.yaml", "--json")[1] == out
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "loved", "tasks": 3}])
    code, _, err = cli("predict", toys, "--file", "rows.jsonl", "--task", "mood")
    assert code == 2
    assert "Line 5" in err


# Exit codes


def test_debug_shows_the_traceback(cli, toys):
    for arguments in (["--debug", "evaluate", toys, "--split", "tset"], ["evaluate", toys, "--split", "x", "--debug"]):
        with pytest.raises(sparse_ft.SparseFTError, match="Unknown split"):
            cli(*arguments)


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_memory_that_runs_out_is_a_mistake_with_advice(cli, monkeypatch, toys, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("sparse_ft.prediction.loaded_model.load_checkpoint", full)
    code, out, err = cli("predict", toys, "text")
    assert (code, out) == (2, "")
    assert all(part in err for part in ("no room", "another --device"))
    assert err.count("\n") == 1


def test_the_unexpected_is_one(cli, monkeypatch):
    def broken(name=None):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("sparse_ft.cli.listing.describe_tasks", broken)
    code, out, err = cli("tasks")
    assert (code, out) == (1, "")
    assert all(part in err for part in ("RuntimeError: out of luck", "--debug"))
    with pytest.raises(RuntimeError):
        cli("tasks", "--debug")


def test_the_installed_command_exits_as_promised(tmp_path):
    command = [str(Path(sys.executable).with_name("sparse-ft")), "tasks", "sentimant"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Unknown task 'sentimant'. Did you mean 'sentiment'?")
    assert done.stderr.count("\n") == 1
