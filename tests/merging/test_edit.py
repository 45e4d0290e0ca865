"""What happens to experts after training, and that no other task notices."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from toy_checkpoints import (
    HEADS,
    add_random_expert,
    all_logits,
    answers,
    assert_bit_identical,
    disk,
    logits,
    saved,
    saved_joint,
)
from toys import call, toy_rows, write_rows

import sparse_ft
from sparse_ft.checkpoint import checkpoint as checkpoint_module
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest, read_metrics
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.config import RunConfig
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.experts.low_rank import prune
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.add import add_from
from sparse_ft.merging.edit import copy_expert, edit, prune_expert, remove_expert, rename_expert

# Checkpoints that no test changes.


@pytest.fixture(scope="module")
def bert(tmp_path_factory, make_model):
    return saved(tmp_path_factory.mktemp("first"), make_model, "bert")


@pytest.fixture(scope="module")
def other(tmp_path_factory, make_model):
    """The same names, other numbers."""
    return saved(tmp_path_factory.mktemp("second"), make_model, "bert", seed=2)


@pytest.fixture(scope="module", params=["token", "sequence"])
def mixed(request, tmp_path_factory, make_model):
    """Two tasks that a gate mixes, with an expert that both share, and a task with an expert of its own."""
    return saved_joint(request.param, tmp_path_factory.mktemp("mixed"), make_model)


def verbs(result):
    return [line.split()[0] for line in result.changes if not line.startswith(" ")]


def served_by(path):
    return {task: entry.expert for task, entry in read_manifest(path).tasks.items()}


def test_remove_takes_the_tasks_with_it(bert, tmp_path):
    before, source = logits(bert, "about", "names"), disk(bert)
    result = edit(bert, remove=["mood"], output=tmp_path / "out")
    assert result.path == tmp_path / "out"
    assert_bit_identical(before, logits(tmp_path / "out", "about", "names"))
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.experts) == list(manifest.tasks) == ["about", "names"]
    assert manifest.first_block == 1  # mood was the only one in block 0
    assert read_metrics(tmp_path / "out") == {"about": {"validation": 0.6}, "names": {"validation": 0.7}}
    assert not [name for name in disk(tmp_path / "out") if "mood" in name]
    assert load_checkpoint(tmp_path / "out").config.sources.keys() == {"about", "names"}
    assert disk(bert) == source


def test_rename_keeps_the_tasks(bert, tmp_path):
    edit(bert, rename=[("names", "tagger")], output=tmp_path / "out")
    assert_bit_identical(logits(bert, *HEADS), logits(tmp_path / "out", *HEADS))
    assert served_by(tmp_path / "out") == {"mood": "mood", "about": "about", "names": "tagger"}
    assert read_metrics(tmp_path / "out") == read_metrics(bert)


def test_copy_copies_task_head_scores_and_word_shapes(bert, tmp_path):
    before = logits(bert, *HEADS)
    edit(bert, copy=[("names", "names2")], output=tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert_bit_identical(before, logits(loaded, *HEADS))
    assert torch.equal(before["names alone"], logits(loaded, "names2")["names2 alone"])
    assert torch.equal(*(loaded.model.experts.get(name).word_shapes for name in ("names", "names2")))
    assert loaded.tasks["names2"] == loaded.tasks["names"].model_copy(update={"name": "names2"})
    assert loaded.metrics["names2"] == {"validation": 0.7}
    assert loaded.config.sources["names2"] == loaded.config.sources["names"]


def test_add_from_another_checkpoint(bert, other, tmp_path):
    before, theirs = logits(bert, *HEADS), logits(other, *HEADS)
    add = [(f"{name}2", other / "experts" / name) for name in ("names", "mood")]
    loaded = load_checkpoint(edit(bert, add=add, output=tmp_path / "out").path)
    assert_bit_identical(before, logits(loaded, *HEADS))
    for name in ("names", "mood"):
        assert torch.equal(theirs[f"{name} alone"], logits(loaded, f"{name}2")[f"{name}2 alone"])
        assert not torch.equal(theirs[f"{name} alone"], before[f"{name} alone"])
        assert loaded.metrics[f"{name}2"] == read_metrics(other)[name]
        assert loaded.config.sources[f"{name}2"] == str(other.parent / name)


def test_add_a_whole_checkpoint_keeps_its_names(bert, tmp_path, make_model):
    single = saved(tmp_path / "single", make_model, "bert", heads={"mood": HEADS["mood"]})
    rest = edit(bert, remove=["mood"], output=tmp_path / "rest").path
    edit(single, add=[(None, rest)], output=tmp_path / "out")
    expected = logits(single, "mood") | logits(rest, "about", "names")
    assert_bit_identical(expected, logits(tmp_path / "out", "mood") | logits(tmp_path / "out", "about", "names"))
    edit(rest, add=[("feeling", single)], output=tmp_path / "named")  # of one expert: may be named at once
    assert served_by(tmp_path / "named") == {"about": "about", "names": "names", "feeling": "feeling"}


def test_prune_changes_only_its_own_tasks_and_drops_their_scores(bert, tmp_path):
    result = edit(bert, prune=[("about", 3)], output=tmp_path / "out")
    assert_bit_identical(logits(bert, "mood", "names"), logits(tmp_path / "out", "mood", "names"))
    assert not torch.equal(logits(bert, "about")["about alone"], logits(tmp_path / "out", "about")["about alone"])
    assert read_manifest(tmp_path / "out").experts["about"].rank == 3
    assert read_metrics(tmp_path / "out").keys() == {"mood", "names"}
    deltas = load_checkpoint(bert).model.experts.get("about").deltas
    assert [line.split()[1] for line in result.changes[1:-1]] == list(deltas)  # the error of each layer


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_changes_are_made_in_the_documented_order(tmp_path, make_model, family):
    path = saved(tmp_path / "first", make_model, family)
    result = edit(
        path, remove=["mood"], rename=[("about", "mood")], copy=[("mood", "again")], prune=[("topics", 2)],
        add=[("topics", path / "experts/about")], output=tmp_path / "out",
    )  # fmt: skip
    assert verbs(result) == ["Removed", "Renamed", "Copied", "Added", "Pruned", "The"]
    assert served_by(tmp_path / "out") == {"about": "mood", "names": "names", "again": "again", "topics": "topics"}
    assert_bit_identical(logits(path, "about", "names"), logits(tmp_path / "out", "about", "names"))


def test_of_several_tasks_that_an_expert_serves(bert):
    loaded = load_checkpoint(bert)
    loaded.tasks["tone"] = loaded.tasks["mood"].model_copy(update={"name": "tone"})
    loaded.model.add_task("tone", expert="mood", level="text", num_outputs=2)
    copy_expert(loaded, "mood", "mood2")
    assert [task for task, slot in loaded.model.tasks.items() if slot.experts == ("mood2",)] == ["mood2", "mood2_tone"]
    rename_expert(loaded, "mood", "feeling")
    assert [task for task, slot in loaded.model.tasks.items() if slot.experts == ("feeling",)] == ["mood", "tone"]
    remove_expert(loaded, "feeling")
    assert list(loaded.tasks) == list(loaded.model.tasks) == ["about", "names", "mood2", "mood2_tone"]


def test_a_gate_follows_a_name_and_goes_with_other_experts(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", gate=True)
    loaded = load_checkpoint(path)
    rename_expert(loaded, "about", "topics")
    prune_expert(loaded, "topics", 2)
    assert loaded.model.gate.names == loaded.model.experts.names == ["mood", "topics", "names"]
    copy_expert(loaded, "mood", "mood2")
    assert loaded.model.gate is None
    edit(path, remove=["mood", "about"], output=tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").model.gate is None
    assert read_metrics(tmp_path / "out") == {"names": {"validation": 0.7}}  # without how often the gate was right


def test_an_expert_without_a_task_is_copied_and_shown(bert, tmp_path):
    loaded = load_checkpoint(bert)
    loaded.model.remove_task("mood")
    del loaded.tasks["mood"]
    copy_expert(loaded, "mood", "mood2")
    save_checkpoint(tmp_path / "out", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    rows = {line.split()[0]: line.split() for line in describe_checkpoint(tmp_path / "out").splitlines() if line}
    assert rows["mood2"][-1] == rows["mood"][-1] == "none"


def test_a_layer_that_no_expert_changes_any_more_is_a_plain_linear(make_model):
    model = make_model("gpt2", {"mood": ("text", 2)}, first_block=2)
    plain = dict(model.encoder.named_modules())["h.0.attn.c_attn"]
    before = all_logits(model, ["mood"])
    add_random_expert(model, "low", first_block=0)
    model.experts.remove("low")
    assert model.first_block == 2
    assert model.encoder.get_submodule("h.0.attn.c_attn") is plain
    assert_bit_identical(before, all_logits(model, ["mood"]))


# Pruning against the dense singular value decomposition


def random_expert(*shapes, alpha=8.0):
    """One delta per (inputs, outputs, rank)."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for index, (inputs, outputs, rank) in enumerate(shapes):
        lora_a = torch.randn(rank, inputs, generator=generator)
        deltas[f"layer{index}"] = (lora_a, torch.randn(outputs, rank, generator=generator))
    return Expert("wide", alpha, deltas)


def dense(expert, module):
    lora_a, lora_b = expert.deltas[module]
    return lora_b.double() @ lora_a.double() * (expert.alpha / len(lora_a))


@pytest.mark.parametrize("rank", [1, 5, 7])
def test_prune_is_the_best_approximation_of_its_rank(rank):
    expert = random_expert((20, 30, 8), (30, 20, 3), (6, 40, 7), (5, 40, 8))
    pruned = prune(expert, rank)
    lost = total = 0.0
    for module in expert.deltas:
        before, after = dense(expert, module), dense(pruned.expert, module)
        least = float(torch.linalg.svdvals(before)[rank:].norm())
        assert float((before - after).norm()) == pytest.approx(least, abs=1e-5)
        assert pruned.errors[module] == pytest.approx(least / float(before.norm()), abs=1e-12)
        present = expert.ranks[module]
        assert pruned.expert.ranks[module] == (present if present <= rank else min(rank, *before.shape))
        if present <= rank:
            assert all(map(torch.equal, expert.deltas[module], pruned.expert.deltas[module]))
        lost, total = lost + least**2, total + float(before.norm()) ** 2
    assert pruned.error == pytest.approx((lost / total) ** 0.5, abs=1e-12)


# The command


def test_the_command_says_what_it_did_and_what_to_type_next(monkeypatch, capsys, tmp_path, bert):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        monkeypatch, capsys, "edit", bert, "--remove", "mood", "--rename", "about=topics", "--copy", "names=names2",
        "--prune", "names2=1", "--add", f"mood={bert}/experts/mood", "--output", "my runs/out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["Removed expert 'mood', and with it task 'mood'.",
                         "Renamed expert 'about' to 'topics'; it serves task 'about'."]  # fmt: skip
    assert lines[-2:] == ["Checkpoint: my runs/out", "Next: sparse-ft inspect 'my runs/out'"]
    code, out, err = call(monkeypatch, capsys, *shlex.split(lines[-1])[2:])
    assert (code, err) == (0, "")
    assert "names2" in out
    text = "Ada met Mozart in Lisbon"
    code, out, err = call(monkeypatch, capsys, "predict", "my runs/out", text, "--task", "names2", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"].keys() == {"names2"}


@pytest.mark.parametrize(("arguments", "said"), [
    ("", "There is nothing to change"),
    ("--remove moood", "'moood'. Did you mean 'mood'? Known: mood, about, names."),
    ("--rename nams=x", "'nams'. Did you mean 'names'?"),
    ("--copy abuot=x", "'abuot'. Did you mean 'about'?"),
    ("--prune Mood=2", "'Mood'. Did you mean 'mood'?"),
    ("--split moody=x", "'moody'. Did you mean 'mood'?"),
    ("--rename mood=about", "There is an expert named 'about' already: mood, about, names."),
    ("--copy mood=names", "There is an expert named 'names' already"),
    ("--split mood=about", "There is an expert named 'about' already"),
    ("--rename mood=tone --copy about=mood", "There is a task named 'mood' already: mood, about"),
    ("--rename mood=a/b", "'a/b'"),
    ("--copy mood=../up", "'../up'"),
    ("--prune mood=5", "'mood' has rank 4"),
    ("--prune mood=0", "'mood' has rank 4"),
    ("--remove mood --remove about --remove names", "'names' is the last expert of"),
    ("--add nowhere", "'nowhere' does not exist."),
    ("--add x=nowhere", "'nowhere' does not exist."),
    ("--add empty", "'empty' holds neither manifest.json nor adapter_config.json."),
    ("--add {bert}", "There is an expert named 'mood' already"),
    ("--add x={bert}", "'x'"),
    ("--add {bert}/experts/nams", "'nams'. Did you mean 'names'?"),
    ("--rename mood", "--rename 'mood' is not of the form OLD=NEW"),
    ("--copy mood=", "--copy 'mood=' is not of the form OLD=NEW"),
    ("--prune mood=two", "--prune 'mood=two' is not of the form NAME=RANK"),
    ("--prune 4", "--prune '4' is not of the form NAME=RANK"),
    ("--remove mood --output full", "'full' is not empty"),
])  # fmt: skip
def test_mistakes_are_explained_and_nothing_is_written(monkeypatch, capsys, tmp_path, bert, arguments, said):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full/below"):
        (tmp_path / name).mkdir(parents=True)
    before = disk(tmp_path)
    options = shlex.split(arguments.format(bert=bert))
    code, out, err = call(monkeypatch, capsys, "edit", bert, "--output", "out", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert disk(tmp_path) == before


def test_what_does_not_fit_is_not_added(bert, tmp_path, tiny_folder, make_model):
    loaded, heads = load_checkpoint(bert), {"about": HEADS["about"]}
    before = logits(loaded, *HEADS)
    strange = saved(tmp_path / "other", make_model, tiny_folder("bert", seed=1), heads=heads)
    with pytest.raises(CheckpointError, match=r"were trained on the backbone .* \(sha256 .*…\)"):
        add_from(loaded, strange, as_name="x")
    pooled = saved(tmp_path / "pooled", make_model, "bert", heads=HEADS, pooling="first")
    with pytest.raises(CheckpointError, match=r"task 'about' in .* first pooling"):
        add_from(loaded, pooled / "experts/about", as_name="x")
    assert_bit_identical(before, logits(loaded, *HEADS))
    assert loaded.model.experts.names == list(HEADS)
    add_from(loaded, pooled / "experts/names", as_name="x")  # a tagger does not pool


def test_an_expert_with_too_few_rows_is_not_split(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", heads={"mood": HEADS["mood"]})
    write_rows(tmp_path / "first/mood/train.jsonl", toy_rows("mood", 2))
    with pytest.raises(ConfigError, match="2 training rows"):
        edit(path, split=[("mood", "mood-2")], output=tmp_path / "out")


def test_scores_at_another_length_are_not_taken_over(bert, tmp_path, make_model):
    config = RunConfig.model_validate({"data": {"max_length": 64}})
    short = saved(tmp_path / "other", make_model, "bert", heads={"about": HEADS["about"]}, config=config)
    loaded = load_checkpoint(bert)
    assert "256 tokens here" in add_from(loaded, short, as_name="x")[1]
    assert "x" not in loaded.metrics


def test_a_save_that_fails_leaves_nothing(bert, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_json", full)
    with pytest.raises(CheckpointError, match="no space left"):
        edit(bert, remove=["mood"], output=tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()


# Tasks that a gate mixes


def test_a_mixed_checkpoint_with_other_names_and_more_experts_answers_as_before(mixed, other, tmp_path):
    before, add = answers(mixed), [("big", other / "experts/about")]
    rename = [("mood", "feeling"), ("common", "everyone")]
    result = edit(
        mixed, rename=rename, copy=[("feeling", "mood2"), ("names", "names2")], add=add, output=tmp_path / "out"
    )
    assert "Copied expert 'feeling' to 'mood2'; it serves no task." in result.changes
    after = answers(tmp_path / "out")
    assert_bit_identical(before, {name: after[name] for name in before})
    assert torch.equal(after["names"], after["names2"])
    assert set(after) == {*HEADS, "names2", "big"}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.gate.experts == ["feeling", "about"]
    changed = {"expert": "feeling", "shared": "everyone"}
    assert manifest.tasks["mood"] == read_manifest(mixed).tasks["mood"].model_copy(update=changed)


def test_an_expert_beside_the_mixed_ones_goes_and_those_that_are_needed_stay(mixed, tmp_path):
    for name, task in (("mood", "about"), ("about", "mood"), ("common", "mood")):
        with pytest.raises(ConfigError, match=rf"Task '{task}' .*'{name}'"):
            edit(mixed, remove=[name], output=tmp_path / "out")
    with pytest.raises(ConfigError, match="'names'"):
        edit(mixed, split=[("names", "tagger")], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = answers(mixed)
    edit(mixed, remove=["names"], output=tmp_path / "out")
    assert_bit_identical({name: before[name] for name in ("mood", "about")}, answers(tmp_path / "out"))


@pytest.mark.parametrize("name", ["about", "common"])
def test_pruning_a_mixed_expert_drops_the_scores_of_all_that_mix_it(mixed, tmp_path, name):
    edit(mixed, prune=[(name, 2)], output=tmp_path / "out")
    assert read_metrics(tmp_path / "out").keys() == {"names"}
    before, after = answers(mixed), answers(tmp_path / "out")
    assert torch.equal(before["names"], after["names"])
    assert not torch.equal(before["mood"], after["mood"])


def test_mixed_experts_do_not_serve_elsewhere(mixed, bert, tmp_path):
    home = edit(bert, remove=["mood", "about"], output=tmp_path / "home").path
    for path in (mixed, mixed / "experts/about"):
        with pytest.raises(CheckpointError, match=r"Task '(mood|about)' of .* several experts"):
            edit(home, add=[(None, path)], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit(home, add=[("names2", mixed / "experts/names")], output=tmp_path / "out")
    assert served_by(tmp_path / "out") == {"names": "names", "names2": "names2"}


def test_a_copy_of_a_task_with_a_shared_expert_answers_alike(bert, tmp_path):
    loaded = load_checkpoint(bert)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], shared="about")
    save_checkpoint(tmp_path / "shared", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    copied = sparse_ft.load(edit(tmp_path / "shared", copy=[("mood", "twin")], output=tmp_path / "out").path)
    texts = ["the table loved", "music"]
    torch.testing.assert_close(copied.logits(texts, "twin"), copied.logits(texts, "mood"))
    assert not torch.allclose(copied.logits(texts, "twin"), sparse_ft.load(bert).logits(texts, "mood"), atol=1e-3)


# Tasks and labels


def test_a_renamed_task_answers_as_before(bert, mixed, tmp_path):
    for number, path in enumerate((bert, mixed)):
        check_renamed(path, tmp_path / str(number))


def check_renamed(path, folder):
    renamed = edit(path, output=folder, rename_task=[("mood", "feeling")])
    before, after = answers(path), answers(renamed.path)
    assert list(after) == ["feeling" if task == "mood" else task for task in before]
    assert_bit_identical(before, {"mood" if task == "feeling" else task: rows for task, rows in after.items()})
    assert served_by(renamed.path)["feeling"] == served_by(path)["mood"]
    assert read_metrics(renamed.path)["feeling"] == read_metrics(path)["mood"]
    sources = load_checkpoint(renamed.path).config.sources
    assert sources.get("feeling") == load_checkpoint(path).config.sources.get("mood")
    assert "mood" not in sources


def test_a_renamed_label_stands_in_answers_and_scores_and_the_data_keeps_its_own(toys, tmp_path):
    result = edit(toys, output=tmp_path / "out", rename_label=[("mood", "good", "great"), ("names", "PER", "person")])
    assert result.changes == [
        "Renamed label 'good' of task 'mood' to 'great'.",
        "Renamed label 'PER' of task 'names' to 'person'.",
    ]
    old, new = sparse_ft.load(toys, device="cpu"), sparse_ft.load(result.path, device="cpu")
    assert new.tasks["mood"].label_names == ["bad", "great"]
    texts = ["the weather loved", "Ada met Mozart in Lisbon"]
    for task, names in (("mood", {"good": "great"}), ("names", {"PER": "person"})):
        for one, other in zip(old.predict(texts, task), new.predict(texts, task), strict=True):
            shown = json.dumps(one.tasks[task])
            for before, after in names.items():
                shown = shown.replace(f'"{before}"', f'"{after}"')
            assert json.loads(shown) == other.tasks[task]
    before, after = (sparse_ft.evaluate(path, tasks=["mood", "names"], device="cpu") for path in (toys, result.path))
    assert after.tasks["mood"].score.metrics == before.tasks["mood"].score.metrics
    assert after.tasks["names"].score.metrics == before.tasks["names"].score.metrics
    assert read_metrics(result.path)["mood"]["report"] == after.to_dict()["tasks"]["mood"]["report"]
    assert read_metrics(result.path)["names"]["token_report"] == after.to_dict()["tasks"]["names"]["token_report"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"rename_task": [("moods", "x")]}, "Unknown task .*'moods'.*Did you mean 'mood'"),
    ({"rename_task": [("mood", "names")]}, "task named 'names' already"),
    ({"rename_label": [("mood", "goood", "x")]}, "Unknown label of task 'mood' 'goood'.*Did you mean 'good'"),
    ({"rename_label": [("mood", "good", "bad")]}, "empty or taken"),
])  # fmt: skip
def test_names_that_cannot_be_are_refused(toys, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        edit(toys, output=tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_command_renames_tasks_and_labels(toys, tmp_path, monkeypatch, capsys):
    arguments = [
        "--rename-task",
        "mood=feeling",
        "--rename-label",
        "feeling:good=very good",
        "--output",
        tmp_path / "o",
    ]
    code, out, err = call(monkeypatch, capsys, "edit", toys, *arguments)
    assert code == 0, err
    assert "Renamed label 'good' of task 'feeling' to 'very good'." in out
    code, _, err = call(monkeypatch, capsys, "edit", toys, "--rename-label", "mood=good", "--output", tmp_path / "p")
    assert code == 2
    assert "TASK:OLD=NEW" in err
