"""Every command, through ``main`` as the console script calls it."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toys import call, quick, settings, toy_rows, write_rows, write_toy

import sparse_ft
from sparse_ft.evaluation.token_routing import route_tokens
from sparse_ft.resources import bundled_names

COMMANDS = ("tasks", "train", "evaluate", "predict", "inspect", "edit", "merge", "export", "import")


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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
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


def test_train_predict_evaluate_inspect(cli, tmp_path, tiny_bert):
    """The way of a newcomer: a bundled sample, then the command that train printed."""
    code, out, err = cli("train", "--task", "sentiment", "--backbone", tiny_bert, *quick(data__train_limit=64))
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
    assert f"accuracy {content['tasks']['sentiment']['metrics']['accuracy']:.3f}" in out
    files = ["confusion_sentiment.png", "report.json", "report.md", "report.txt"]
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == files
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["tasks"] == content["tasks"]
    code, out, err = cli("inspect", "runs/sentiment")
    assert (code, err) == (0, "")
    assert f"accuracy {content['tasks']['sentiment']['metrics']['accuracy']:.3f}" in out


def test_evaluate_writes_the_json_of_the_python_function(cli, toys):
    code, _, err = cli("evaluate", toys, "--task", "names", "--task", "mood", "--json", "deep/scores.json")
    assert code == 0, err
    expected = sparse_ft.evaluate(toys, tasks=["names", "mood"]).to_dict()
    assert json.loads(Path("deep/scores.json").read_text()) == expected
    assert set(expected) == {"checkpoint", "split", "route", "tasks", "routing"}


def test_the_default_output_is_the_next_free_one(cli, tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "about")]
    one = ["train", "--task", tasks[0], "--backbone", tiny_bert, *quick()]
    for expected in ("runs/mood", "runs/mood-2", "runs/mood-3"):
        before = {file: file.read_bytes() for file in tmp_path.glob("runs/**/*") if file.is_file()}
        code, out, err = cli(*one)
        assert code == 0, err
        assert f"Checkpoint: {expected}\n" in out
        assert all(file.read_bytes() == content for file, content in before.items())
    code, out, _ = cli("train", "--task", tasks[0], "--task", tasks[1], "--backbone", tiny_bert, *quick())
    assert code == 0
    assert "Checkpoint: runs/mood-about\n" in out


@pytest.mark.parametrize(("name", "output", "changes"), [
    ("mood", "out", {}),
    ("mood", "my runs/it's here", {}),
    ("mood", "out", {"example": "-5 degrees, it's \"cold\" $HOME"}),
    ("reply", "out", {}),
    ("reply", "out", {"example": ""}),
    ("names", "out", {"example": ""}),
])  # fmt: skip
def test_the_printed_next_command_runs(cli, tmp_path, tiny_bert, name, output, changes):
    task = write_toy(tmp_path, name, sizes=(8, 4, 4), **changes)
    code, out, err = cli("train", "--task", task, "--backbone", tiny_bert, "--output", output, *quick())
    assert code == 0, err
    code, answer, err = cli(*next_command(out))
    assert code == 0, err
    assert f"  {name}  " in answer
    assert answer.startswith(changes.get("example") or "")


def test_the_printed_next_command_names_the_task_if_tasks_read_different_things(cli, tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "reply")]
    code, out, err = cli("train", "--task", tasks[0], "--task", tasks[1], "--backbone", tiny_bert, *quick())
    assert code == 0, err
    code, answer, err = cli(*next_command(out))
    assert code == 0, err
    assert "  mood  " in answer


def test_config_set_data_and_from(cli, tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "about")]
    for name, size in (("mood", 24), ("about", 16)):
        for split in ("train", "validation", "test"):
            write_rows(tmp_path / "other" / name / f"{split}.jsonl", toy_rows(name, size, seed=4))
    (tmp_path / "run.yaml").write_text("train: {epochs: 7, min_steps: 0, batch_size: 8}\nseed: 3\n")
    code, out, err = cli(
        "train", "--task", tasks[0], "--task", tasks[1], "--data", "mood=other/mood", "--data", "about=other/about",
        "--config", "run.yaml", "--set", "train.epochs=1", "--seed", 5, "--backbone", tiny_bert, "--output", "first",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "mood · test (24 rows)" in out
    assert "about · test (16 rows)" in out
    config = sparse_ft.load("first", device="cpu").checkpoint.config
    assert (config.train.epochs, config.train.batch_size, config.seed) == (1, 8, 5)
    names = write_toy(tmp_path, "names", sizes=(8, 4, 4))
    code, _, err = cli("train", "--task", names, "--from", "first", "--output", "second", *quick())
    assert code == 0, err
    assert list(sparse_ft.load("second", device="cpu").tasks) == ["mood", "about", "names"]
    code, out, err = cli("evaluate", "second", "--task", "mood", "--data", "other/mood", "--split", "train")
    assert code == 0, err
    assert "mood · train (24 rows)" in out


def test_one_file_is_divided_and_said_so(cli, tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    write_rows(tmp_path / "all.jsonl", toy_rows("mood", 40))
    code, out, err = cli("train", "--task", task, "--data", "all.jsonl", "--backbone", tiny_bert, *quick())
    assert code == 0, err
    assert "its 40 rows are divided into 32 for train, 4 for validation and 4 for test" in err
    assert "mood · test (4 rows)" in out


@pytest.mark.parametrize("name", bundled_names("configs"))
def test_bundled_configs_train(cli, tmp_path, tiny_bert, name):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    small = ["train.min_steps=0", "train.epochs=1", "experts.first_block=0"]
    code, _, err = cli(
        "train", "--task", task, "--config", name, "--backbone", tiny_bert, "--output", "out", "--device", "cpu",
        *(part for option in small for part in ("--set", option)),
    )  # fmt: skip
    assert code == 0, err


def stopping(save):
    """Save, and press Ctrl-C."""

    def stop(loop):
        save(loop)
        raise KeyboardInterrupt

    return stop


def test_resume(cli, tmp_path, tiny_bert, monkeypatch):
    from sparse_ft.training import loop as fitting

    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    with monkeypatch.context() as patch:
        patch.setattr(fitting._Loop, "save", stopping(fitting._Loop.save))
        code, _, err = cli("train", "--task", task, "--backbone", tiny_bert, "--output", "out", *quick())
        assert code not in (0, 2)
    code, _, err = cli("predict", "out", "text")
    assert code == 2
    (advised,) = re.findall(r"`sparse-ft (.*?)`", err)
    code, out, err = cli(*shlex.split(advised))
    assert code == 0, err
    assert "Checkpoint: out\n" in out


def test_paths_of_a_config_hold_in_every_folder(cli, tmp_path, tiny_bert, monkeypatch):
    """Also those of the interrupted run, and of the checkpoint that evaluate reads its data by."""
    from sparse_ft.training import loop as fitting

    files = {"format": "jsonl", **{split: f"{split}.jsonl" for split in ("train", "validation", "test")}}
    write_toy(tmp_path, "mood", sizes=(8, 4, 4), files=files)
    (tmp_path / "bert").symlink_to(tiny_bert)
    run = {"tasks": ["mood.yaml"], "backbone": "bert", "sources": {"mood": "mood"}, "output": "out"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with monkeypatch.context() as patch:
        patch.setattr(fitting._Loop, "save", stopping(fitting._Loop.save))
        assert cli("train", "--config", "run.yaml", *quick())[0] not in (0, 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in (["train", "--resume", "--output", "../out"], ["evaluate", "../out"]):
        code, _, err = cli(*command)
        assert code == 0, err


def test_the_report_shows_what_the_route_did(cli, toys, tmp_path):
    code, _, err = cli("evaluate", toys, "--route", "arrow", "--report", "report", "--device", "cpu")
    assert code == 0, err
    names = {file.name for file in (tmp_path / "report").glob("*.png")}
    assert names == {"confusion_mood.png", "confusion_reply.png", "routing.png", "routing_blocks.png"}
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert list(content["routing"]["blocks"]) == ["0", "1", "2"]
    markdown = (tmp_path / "report/report.md").read_text()
    assert all(f"]({name})" in markdown for name in names)


def test_a_report_without_matplotlib_has_no_pictures_and_says_how_to_get_them(cli, toys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("evaluate", toys, "--task", "mood", "--report", "report", "--device", "cpu")
    assert code == 0
    assert "The report has no pictures. Pictures need matplotlib" in err
    assert 'pip install "sparse-ft[plots]"' in err
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["report.json", "report.md", "report.txt"]


# Inspect


def test_inspect_a_text(cli, toys, tmp_path):
    code, out, err = cli("inspect", toys, "--text", "Ada in London", "--route", "arrow", "--picture", "new/ada.png")
    assert (code, err) == (0, "")
    assert out.startswith("Route arrow: every token chooses its experts anew in each block (7 tokens, blocks 0 to 2).")
    assert out.endswith("\nPicture: new/ada.png\n")
    assert (tmp_path / "new/ada.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("inspect", toys, "--text", "Ada in London", "--route", "arrow", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == route_tokens(toys, "Ada in London", route="arrow", device="cpu").to_dict()
    code, out, err = cli("inspect", toys, "--text", "")
    assert (code, err) == (0, "")
    assert out.startswith("Route gate: one choice for the whole text, the same for all its tokens in all blocks")


@pytest.mark.parametrize(("options", "message"), [
    (["--text", "Ada", "--route", "unifrom"], "Unknown route 'unifrom'. Did you mean 'uniform'?"),
    (["--text", "Ada", "--route", "task"], "a text alone belongs to no task"),
    (["--text", "Ada", "--picture", "ada.jpg"], "--picture 'ada.jpg' is no PNG. Give a file name that ends in .png."),
    (["--text", "Ada", "--picture", "taken/ada.png"], "taken is a file, not a folder. Choose another folder."),
    (["--picture", "ada.png"], "--picture is about the routing of a text, and none is given. Add --text TEXT."),
    (["--json"], "--json is about the routing of a text, and none is given. Add --text TEXT."),
])  # fmt: skip
def test_what_inspect_cannot_show_is_explained_and_nothing_written(cli, toys, tmp_path, options, message):
    (tmp_path / "taken").write_text("mine")
    code, out, err = cli("inspect", toys, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_a_picture_without_matplotlib_is_refused(cli, toys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = cli("inspect", toys, "--text", "Ada", "--picture", "ada.png")
    assert (code, out) == (2, "")
    assert err.startswith("Error: Pictures need matplotlib, which is not installed. Install it with `pip install")
    assert err.count("\n") == 1
    assert cli("inspect", toys, "--text", "Ada")[0] == 0


# Predict


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_bert):
    """A checkpoint of two tasks on single texts."""
    folder = tmp_path_factory.mktemp("single")
    tasks = [write_toy(folder, name, sizes=(16, 4, 4)) for name in ("mood", "names")]
    sparse_ft.train(tasks, backbone=str(tiny_bert), output=folder / "out", overrides=settings(), device="cpu")
    return folder / "out"


TEXTS = ["Ada in London", "", "the table\tloved 😀", "a\u2028b"]


def expected_lines(checkpoint: Path, texts: list[str]) -> list[dict]:
    return [prediction.to_dict() for prediction in sparse_ft.load(checkpoint).predict(texts, "all")]


def test_predict_from_arguments_file_and_stdin(cli, single, tmp_path, monkeypatch):
    expected = expected_lines(single, TEXTS)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    (tmp_path / "windows.txt").write_bytes(("\ufeff" + "\r\n".join(TEXTS)).encode())

    def stdin():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode() + b"\n")))

    for arguments in ([*TEXTS], ["--file", "texts.txt"], ["--file", "windows.txt"], ["--file", "-"], []):
        stdin()
        code, out, err = cli("predict", single, *arguments, "--task", "all", "--json")
        assert (code, err) == (0, "")
        lines = out.removesuffix("\n").split("\n")
        found = [json.loads(line) for line in lines]
        assert [line["text"] for line in found] == TEXTS
        for line, other in zip(found, expected, strict=True):
            assert list(line) == ["text", "tasks", "routing"]
            assert line["tasks"]["mood"]["label"] == other["tasks"]["mood"]["label"]
            assert line["tasks"]["names"] == other["tasks"]["names"]


def test_predict_for_people(cli, single):
    code, out, err = cli("predict", single, "Ada in London", "half", "--task", "mood")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [lines[0], lines[2]] == ["Ada in London", "half"]
    assert re.fullmatch(r"  mood  (good|bad) \([01]\.\d\d\)", lines[1])
    code, both, _ = cli("predict", single, "Ada in London", "--task", "all")
    assert [line.split()[0] for line in both.splitlines()[1:]] == ["mood", "names"]
    chosen = cli("predict", single, "Ada in London")[1].splitlines()
    assert len(chosen) == 2  # the gate decides for one of them
    assert chosen[1].split() in [line.split() for line in both.splitlines()[1:]]


def test_predict_pairs(cli, toys):
    code, out, err = cli("predict", toys, "the table\thalf loved", "--task", "reply", "--json")
    assert (code, err) == (0, "")
    line = json.loads(out)
    assert (line["text"], line["text_pair"]) == ("the table", "half loved")
    code, _, err = cli("predict", toys, "no pair", "--task", "reply")
    assert code == 2
    assert "reads two texts a row, got one: 'no pair'" in err


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
    found = [json.loads(line) for line in out.splitlines()]
    assert [list(line["tasks"]) for line in found] == [["mood"], ["names", "about"], ["about"], []]
    assert [line.get("unknown", False) for line in found] == [False, False, False, True]
    shown = cli("predict", toys, "Ada met Mozart", "--route", "rules.yaml")[1]
    assert shown == "Ada met Mozart\n  unknown: no expert is for such a text\n"
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write("\n  \n")  # blank lines say nothing, and count
    assert cli("predict", toys, "--file", "rows.jsonl", "--route", "rules.yaml", "--json")[1] == out
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "loved", "task": "mood"}])
    code, _, err = cli("predict", toys, "--file", "rows.jsonl", "--task", "mood")
    assert code == 2
    assert "Line 5 is not such a row" in err


def test_predict_an_empty_file(cli, single, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert cli("predict", single, "--file", "empty.txt") == (0, "", "")


# Exit codes


def test_a_users_mistake_is_one_paragraph_and_two(cli, toys):
    code, out, err = cli("evaluate", toys, "--split", "tset")
    assert (code, out) == (2, "")
    assert err.startswith("Error: Unknown split 'tset'. Did you mean 'test'?")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(cli, toys):
    with pytest.raises(sparse_ft.SparseFTError, match="Unknown split 'tset'"):
        cli("--debug", "evaluate", toys, "--split", "tset")
    with pytest.raises(sparse_ft.SparseFTError):
        cli("evaluate", toys, "--split", "tset", "--debug")


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_memory_that_runs_out_is_a_mistake_with_advice(cli, monkeypatch, toys, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("sparse_ft.prediction.loaded_model.load_checkpoint", full)
    code, out, err = cli("predict", toys, "text")
    assert (code, out) == (2, "")
    assert err.startswith("Error: Out of memory (no room). ")
    assert "another --device" in err
    assert err.count("\n") == 1


def test_the_unexpected_is_one(cli, monkeypatch):
    def broken(name=None):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("sparse_ft.cli.listing.describe_tasks", broken)
    code, out, err = cli("tasks")
    assert (code, out) == (1, "")
    assert err == "Unexpected error: RuntimeError: out of luck. Run again with --debug to see where.\n"
    with pytest.raises(RuntimeError):
        cli("tasks", "--debug")


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--tsk", "ner"], ["train", "--stage", "gate"],
                                       ["train", "--seed", "x"], ["evaluate"], ["predict"]])  # fmt: skip
def test_a_mistake_in_the_options_is_two(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "Error" in err


def test_the_installed_command_exits_as_promised(tmp_path):
    command = [str(Path(sys.executable).with_name("sparse-ft")), "tasks", "sentimant"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: Unknown task 'sentimant'. Did you mean 'sentiment'?")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
