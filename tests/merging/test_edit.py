"""What happens to experts after training, and that no other task notices."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_checkpoints import (
    HEADS,
    add_random_expert,
    all_logits,
    answers,
    assert_bit_identical,
    logits,
    saved,
    saved_joint,
)
from toys import call

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest, read_metrics
from sparse_ft.cli.listing import describe_checkpoint
from sparse_ft.config import RunConfig
from sparse_ft.errors import CheckpointError, ConfigError
from sparse_ft.experts.named_experts import Expert
from sparse_ft.merging.edit import add_from, copy_expert, edit, prune_expert, remove_expert, rename_expert
from sparse_ft.merging.low_rank import prune, truncate

FAMILIES = ("bert", "gpt2")


@pytest.fixture(params=FAMILIES)
def path(request, tmp_path, make_model):
    return saved(tmp_path / "first", make_model, request.param)


@pytest.fixture
def bert(tmp_path, make_model):
    return saved(tmp_path / "first", make_model, "bert")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# The five changes: each is made in memory, saved, and read again.


def test_remove_takes_the_tasks_with_it(path, tmp_path):
    before, source = logits(path, "about", "names"), files_of(path)
    result = edit(path, remove=["mood"], output=tmp_path / "out")
    assert result.changes == ["Removed expert 'mood', and with it task 'mood'."]
    assert result.path == tmp_path / "out"
    assert_bit_identical(before, logits(tmp_path / "out", "about", "names"))
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["experts"]) == list(manifest["tasks"]) == ["about", "names"]
    assert manifest["first_block"] == 1  # mood was the only one in block 0
    assert read_metrics(tmp_path / "out") == {"about": {"validation": 0.6}, "names": {"validation": 0.7}}
    assert not [name for name in files_of(tmp_path / "out") if "mood" in name]
    assert load_checkpoint(tmp_path / "out").config.sources.keys() == {"about", "names"}
    assert files_of(path) == source


def test_rename_keeps_the_tasks(path, tmp_path):
    before = logits(path, *HEADS)
    result = edit(path, rename=[("names", "tagger")], output=tmp_path / "out")
    assert result.changes == ["Renamed expert 'names' to 'tagger'; it serves task 'names'."]
    assert_bit_identical(before, logits(tmp_path / "out", *HEADS))
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["experts"]) == ["mood", "about", "tagger"]
    assert manifest["tasks"]["names"]["expert"] == "tagger"
    assert read_metrics(tmp_path / "out") == read_metrics(path)


def test_copy_copies_task_head_scores_and_word_shapes(path, tmp_path):
    before = logits(path, *HEADS)
    result = edit(path, copy=[("names", "names2")], output=tmp_path / "out")
    assert result.changes == ["Copied expert 'names' to 'names2', which serves task 'names2'."]
    loaded = load_checkpoint(tmp_path / "out")
    assert_bit_identical(before, logits(loaded, *HEADS))
    assert torch.equal(before["names alone"], logits(loaded, "names2")["names2 alone"])
    assert torch.equal(loaded.model.experts.get("names").word_shapes, loaded.model.experts.get("names2").word_shapes)
    assert loaded.tasks["names2"] == loaded.tasks["names"].model_copy(update={"name": "names2"})
    assert loaded.metrics["names2"] == loaded.metrics["names"] == {"validation": 0.7}
    assert loaded.config.sources["names2"] == loaded.config.sources["names"]


def test_add_from_another_checkpoint(path, tmp_path, make_model):
    family = "gpt2" if load_checkpoint(path).model.backbone.family.causal else "bert"
    other = saved(tmp_path / "other", make_model, family, seed=2)
    before, theirs = logits(path, *HEADS), logits(other, *HEADS)
    one = other / "experts/names"
    result = edit(path, add=[("names2", one), ("mood2", other / "experts" / "mood")], output=tmp_path / "out")
    assert result.changes[0] == f"Added 'names2' from {str(other)!r}, which serves task 'names2'."
    loaded = load_checkpoint(tmp_path / "out")
    assert_bit_identical(before, logits(loaded, *HEADS))
    for name in ("names", "mood"):
        assert torch.equal(theirs[f"{name} alone"], logits(loaded, f"{name}2")[f"{name}2 alone"])
        assert not torch.equal(theirs[f"{name} alone"], before[f"{name} alone"])
        assert loaded.metrics[f"{name}2"] == read_metrics(other)[name]
        assert loaded.config.sources[f"{name}2"] == str(tmp_path / "other" / name)


def test_add_a_whole_checkpoint_keeps_its_names(tmp_path, make_model):
    first = saved(tmp_path / "first", make_model, "bert", heads={"mood": HEADS["mood"]})
    second = saved(tmp_path / "second", make_model, "bert", heads={name: HEADS[name] for name in ("about", "names")})
    before = logits(first, "mood") | logits(second, "about", "names")
    result = edit(first, add=[(None, second)], output=tmp_path / "out")
    assert result.changes == [f"Added 'about', 'names' from {str(second)!r}, which serve tasks 'about', 'names'."]
    assert_bit_identical(before, logits(tmp_path / "out", "mood") | logits(tmp_path / "out", "about", "names"))
    named = edit(second, add=[("feeling", first)], output=tmp_path / "named")  # of one expert: may be named at once
    assert named.changes == [f"Added 'feeling' from {str(first)!r}, which serves task 'feeling'."]


def test_prune_changes_only_its_own_tasks_and_drops_their_scores(path, tmp_path):
    before = logits(path, "mood", "names")
    result = edit(path, prune=[("about", 3)], output=tmp_path / "out")
    assert_bit_identical(before, logits(tmp_path / "out", "mood", "names"))
    assert not torch.equal(logits(path, "about")["about alone"], logits(tmp_path / "out", "about")["about alone"])
    assert read_manifest(tmp_path / "out")["experts"]["about"]["rank"] == 3
    assert list(read_manifest(tmp_path / "out")["experts"]) == list(HEADS)
    assert read_metrics(tmp_path / "out").keys() == {"mood", "names"}
    deltas = load_checkpoint(path).model.experts.get("about").deltas
    assert result.changes[0].startswith("Pruned expert 'about' to rank 3. Relative error of its deltas: 0.")
    assert [line.split()[1] for line in result.changes[1:-1]] == list(deltas)
    assert result.changes[-1] == "The scores of task 'about' are dropped; `sparse-ft evaluate` measures them anew."


def test_changes_are_made_in_the_documented_order(bert, tmp_path):
    result = edit(
        bert, remove=["mood"], rename=[("about", "mood")], copy=[("mood", "again")], prune=[("topics", 2)],
        add=[("topics", bert / "experts/about")], output=tmp_path / "out",
    )  # fmt: skip
    verbs = [line.split()[0] for line in result.changes if not line.startswith(" ")]
    assert verbs == ["Removed", "Renamed", "Copied", "Added", "Pruned", "The"]
    served = {task: entry["expert"] for task, entry in read_manifest(tmp_path / "out")["tasks"].items()}
    assert served == {"about": "mood", "names": "names", "again": "again", "topics": "topics"}


def test_of_several_tasks_that_an_expert_serves(bert, tmp_path):
    loaded = load_checkpoint(bert)
    loaded.tasks["tone"] = loaded.tasks["mood"].model_copy(update={"name": "tone"})
    loaded.model.add_task("tone", expert="mood", level="text", num_outputs=2)
    copy_expert(loaded, "mood", "mood2")
    assert [task for task, slot in loaded.model.tasks.items() if slot.experts == ("mood2",)] == ["mood2", "mood2_tone"]
    rename_expert(loaded, "mood", "feeling")
    assert [task for task, slot in loaded.model.tasks.items() if slot.experts == ("feeling",)] == ["mood", "tone"]
    said = remove_expert(loaded, "feeling")
    assert said == ["Removed expert 'feeling', and with it tasks 'mood', 'tone'."]
    assert list(loaded.tasks) == list(loaded.model.tasks) == ["about", "names", "mood2", "mood2_tone"]


def test_a_gate_follows_a_name_and_goes_with_other_experts(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", gate=True)
    loaded = load_checkpoint(path)
    rename_expert(loaded, "about", "topics")
    prune_expert(loaded, "topics", 2)
    assert loaded.model.gate.names == loaded.model.experts.names == ["mood", "topics", "names"]
    said = copy_expert(loaded, "mood", "mood2")
    assert said[1].startswith("The gate is dropped, because it chose among other experts;")
    assert loaded.model.gate is None
    result = edit(path, remove=["mood", "about"], output=tmp_path / "out")
    assert [line.split()[0] for line in result.changes] == ["Removed", "The", "Removed"]
    assert load_checkpoint(tmp_path / "out").model.gate is None
    assert read_metrics(tmp_path / "out") == {"names": {"validation": 0.7}}


# Pruning against the dense singular value decomposition


def random_expert(*shapes, alpha=8.0):
    """One delta per (inputs, outputs, rank)."""
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    for place, (inputs, outputs, rank) in enumerate(shapes):
        lora_a = torch.randn(rank, inputs, generator=generator)
        deltas[f"layer{place}"] = (lora_a, torch.randn(outputs, rank, generator=generator))
    return Expert("wide", alpha, deltas)


def dense(expert, module):
    lora_a, lora_b = expert.deltas[module]
    return lora_b.double() @ lora_a.double() * (expert.alpha / len(lora_a))


@pytest.mark.parametrize("rank", [1, 2, 5, 7, 8])
def test_prune_is_the_best_approximation_of_its_rank(rank):
    expert = random_expert((20, 30, 8), (30, 20, 8), (6, 40, 7), (5, 40, 8))
    pruned = prune(expert, rank)
    assert pruned.expert.alpha == expert.alpha
    lost = whole = 0.0
    for module in expert.deltas:
        before, after = dense(expert, module), dense(pruned.expert, module)
        values = torch.linalg.svdvals(before)
        least = float(values[rank:].norm())
        assert float((before - after).norm()) == pytest.approx(least, abs=1e-5)
        assert pruned.errors[module] == pytest.approx(least / float(before.norm()), abs=1e-12)
        present = expert.ranks[module]
        assert pruned.expert.ranks[module] == (present if present <= rank else min(rank, *before.shape))
        lost, whole = lost + least**2, whole + float(before.norm()) ** 2
    assert pruned.error == pytest.approx((lost / whole) ** 0.5, abs=1e-12)


def test_layers_of_a_small_enough_rank_keep_their_bits():
    expert = random_expert((20, 30, 8), (30, 20, 3))
    pruned = prune(expert, 4)
    assert all(torch.equal(*pair) for pair in zip(expert.deltas["layer1"], pruned.expert.deltas["layer1"], strict=True))
    assert pruned.errors["layer1"] == 0
    assert pruned.expert.ranks == {"layer0": 4, "layer1": 3}


def test_a_fresh_expert_can_still_learn_after_pruning():
    found = truncate(torch.randn(8, 20), torch.zeros(30, 8), 4)
    assert (found.norm, found.lost) == (0, 0)
    torch.testing.assert_close(found.lora_a @ found.lora_a.t(), torch.eye(4), atol=1e-5, rtol=0)
    expert = Expert("fresh", 8.0, {"layer": (torch.randn(8, 20), torch.zeros(30, 8))})
    assert prune(expert, 4).error == 0


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_is_no_pruning_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"'wide' has rank 8, and was to get {rank}\. Choose 1 to 8\."):
        prune(random_expert((20, 30, 8), (20, 30, 2)), rank)


# What is refused, and in which words; nothing is written then


@pytest.mark.parametrize(("changes", "message"), [
    ({}, r"No change is asked for\. Give at least one --remove, --rename, --copy, --add, --prune or --split\."),
    ({"remove": ["moood"]}, r"Unknown expert 'moood'\. Did you mean 'mood'\? Known: mood, about, names\."),
    ({"rename": [("nams", "x")]}, r"Unknown expert 'nams'\. Did you mean 'names'\?"),
    ({"copy": [("abuot", "x")]}, r"Unknown expert 'abuot'\. Did you mean 'about'\?"),
    ({"prune": [("Mood", 2)]}, r"Unknown expert 'Mood'\. Did you mean 'mood'\?"),
    ({"rename": [("mood", "about")]}, "There is an expert named 'about' already: mood, about, names. Choose another"),
    ({"copy": [("mood", "names")]}, "There is an expert named 'names' already"),
    ({"rename": [("mood", "tone")], "copy": [("about", "mood")]}, "There is a task named 'mood' already: mood, about"),
    ({"rename": [("mood", "a/b")]}, "The name 'a/b' is not allowed: use letters, digits, - and _"),
    ({"copy": [("mood", "../up")]}, "The name '../up' is not allowed"),
    ({"prune": [("mood", 5)]}, r"Expert 'mood' has rank 4, and was to get 5\. Choose 1 to 4\."),
    ({"remove": ["mood", "about", "names"]}, "'names' is the last expert of .*; a checkpoint holds at least one"),
    ({"add": [(None, "nowhere")]}, r"'nowhere' does not exist\. Give a checkpoint, one expert of it"),
    ({"add": [(None, ".")]}, r"'\.' holds neither manifest\.json nor adapter_config\.json\. Give a checkpoint"),
])  # fmt: skip
def test_mistakes_are_explained_and_nothing_is_written(bert, tmp_path, monkeypatch, changes, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = files_of(bert)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        edit(bert, **changes, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert files_of(bert) == before


def test_names_of_an_added_checkpoint_are_checked(bert, tmp_path, make_model):
    loaded = load_checkpoint(bert)
    before = logits(loaded, *HEADS)
    with pytest.raises(ConfigError, match="There is an expert named 'mood' already: mood, about, names"):
        add_from(loaded, bert)
    with pytest.raises(ConfigError, match=r"holds 3 experts \(mood, about, names\), which cannot all be named 'x'"):
        add_from(loaded, bert, as_name="x")
    with pytest.raises(ConfigError, match=r"Unknown expert of .*checkpoint' 'nams'\. Did you mean 'names'\?"):
        add_from(loaded, bert / "experts/nams")
    assert_bit_identical(before, logits(loaded, *HEADS))
    assert loaded.model.experts.names == list(HEADS)


def test_a_checkpoint_on_another_backbone_or_pooling_is_refused(bert, tmp_path, tiny_folder, make_model):
    heads = {"about": HEADS["about"]}
    other = saved(tmp_path / "other", make_model, tiny_folder("bert", seed=1), heads=heads)
    with pytest.raises(CheckpointError, match=r"were trained on the backbone .* \(sha256 .*…\), not on .*Train them"):
        add_from(load_checkpoint(bert), other, as_name="x")
    other = saved(tmp_path / "pooled", make_model, "bert", heads=heads, pooling="first")
    with pytest.raises(
        CheckpointError, match=r"head of task 'about' in .* reads first pooling; this checkpoint has unit"
    ):
        add_from(load_checkpoint(bert), other, as_name="x")
    heads = {"names": HEADS["names"]}  # a tagger does not pool
    add_from(load_checkpoint(bert), saved(tmp_path / "tagger", make_model, "bert", heads=heads, pooling="first"),
             as_name="x")  # fmt: skip


def test_scores_at_another_length_are_not_taken_over(bert, tmp_path, make_model):
    config = RunConfig.model_validate({"data": {"max_length": 64}})
    other = saved(tmp_path / "other", make_model, "bert", heads={"about": HEADS["about"]}, config=config)
    loaded = load_checkpoint(bert)
    said = add_from(loaded, other, as_name="x")
    assert said[1].startswith("Texts are cut at 256 tokens here and were at 64 there")
    assert "x" not in loaded.metrics


@pytest.mark.parametrize(("prepare", "message"), [
    (lambda folder: (folder / "kept").write_text("x"), "'out' is not empty and no checkpoint. Choose another --output"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "'out' holds a checkpoint already. Choose another"),
])  # fmt: skip
def test_a_folder_that_holds_something_is_never_written(bert, tmp_path, monkeypatch, prepare, message):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    prepare(Path("out"))
    before = files_of(Path("out"))
    with pytest.raises(ConfigError, match=message):
        edit(bert, remove=["mood"], output="out")
    assert files_of(Path("out")) == before
    Path("file").write_text("kept")
    with pytest.raises(ConfigError, match=r"'file' is a file, not a folder\. Choose another --output"):
        edit(bert, remove=["mood"], output="file")


def test_a_save_that_fails_leaves_nothing(bert, tmp_path, monkeypatch):
    from sparse_ft.checkpoint import checkpoint as checkpoint_module

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_json", full)
    with pytest.raises(CheckpointError, match="no space left"):
        edit(bert, remove=["mood"], output=tmp_path / "deep/out")
    assert list((tmp_path / "deep").iterdir()) == []


# Experts.replace and Experts.rename


def test_replace_keeps_the_order_and_refuses_before_it_changes_anything(make_model):
    model = make_model("bert", HEADS, first_block=1)
    before = all_logits(model, list(HEADS))
    model.experts.replace(model.experts.get("mood"))
    assert model.experts.names == list(HEADS)
    assert_bit_identical(before, all_logits(model, list(HEADS)))
    with pytest.raises(CheckpointError, match="changes the layer 'nowhere'"):
        model.experts.replace(Expert("mood", 1.0, {"nowhere": (torch.zeros(1, 32), torch.zeros(32, 1))}))
    with pytest.raises(CheckpointError, match="There is an expert named 'names' already"):
        model.experts.rename("mood", "names")
    assert_bit_identical(before, all_logits(model, list(HEADS)))


def test_a_layer_that_no_expert_changes_any_more_is_a_plain_linear(make_model):
    model = make_model("gpt2", {"mood": ("text", 2)}, first_block=2)
    plain = dict(model.encoder.named_modules())["h.0.attn.c_attn"]
    before = all_logits(model, ["mood"])
    add_random_expert(model, "low", first_block=0)
    assert model.first_block == 0
    model.experts.remove("low")
    assert model.first_block == 2
    assert model.encoder.get_submodule("h.0.attn.c_attn") is plain
    assert_bit_identical(before, all_logits(model, ["mood"]))


# The command


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def test_the_command_says_what_it_did_and_what_to_type_next(cli, bert):
    code, out, err = cli(
        "edit", bert, "--remove", "mood", "--rename", "about=topics", "--copy", "names=names2", "--prune", "names2=1",
        "--add", f"mood={bert}/experts/mood", "--output", "my runs/out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["Removed expert 'mood', and with it task 'mood'.",
                         "Renamed expert 'about' to 'topics'; it serves task 'about'."]  # fmt: skip
    assert lines[-2:] == ["Checkpoint: my runs/out", "Next: sparse-ft inspect 'my runs/out'"]
    code, out, err = cli(*shlex.split(lines[-1])[2:])
    assert (code, err) == (0, "")
    assert "names2" in out
    code, out, err = cli("predict", "my runs/out", "Ada met Mozart in Lisbon", "--task", "names2", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"].keys() == {"names2"}


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "No change is asked for. Give at least one --remove"),
    (["--rename", "mood"], "--rename 'mood' is not of the form OLD=NEW. Write e.g. --rename ner=names."),
    (["--copy", "mood="], "--copy 'mood=' is not of the form OLD=NEW"),
    (["--prune", "mood=two"], "--prune 'mood=two' is not of the form NAME=RANK. Write e.g. --prune ner=4."),
    (["--prune", "4"], "--prune '4' is not of the form NAME=RANK"),
    (["--prune", "mood=0"], "Expert 'mood' has rank 4, and was to get 0. Choose 1 to 4."),
    (["--remove", "moods"], "Unknown expert 'moods'. Did you mean 'mood'?"),
    (["--add", "x=nowhere"], "'nowhere' does not exist."),
])  # fmt: skip
def test_a_mistake_is_one_paragraph_and_exit_code_two(cli, bert, arguments, message):
    code, out, err = cli("edit", bert, *arguments, "--output", "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {message}")
    assert err.count("\n") == 1
    assert not Path("out").exists()


def test_an_expert_without_a_task_is_shown(bert, tmp_path):
    loaded = load_checkpoint(bert)
    loaded.model.remove_task("mood")
    del loaded.tasks["mood"]
    assert copy_expert(loaded, "mood", "mood2") == ["Copied expert 'mood' to 'mood2'; it serves no task."]
    save_checkpoint(tmp_path / "out", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics={})
    rows = {line.split()[0]: line.split() for line in describe_checkpoint(tmp_path / "out").splitlines() if line}
    assert rows["mood2"][-1] == rows["mood"][-1] == "none"


# Tasks that a gate mixes


@pytest.fixture(params=["token", "sequence"])
def mixed(request, tmp_path, make_model):
    return saved_joint(request.param, tmp_path / "first", make_model)


def test_a_mixed_checkpoint_with_other_names_answers_as_before(mixed, tmp_path):
    before = answers(mixed)
    edit(mixed, rename=[("mood", "feeling"), ("common", "everyone")], output=tmp_path / "out")
    assert_bit_identical(before, answers(tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["gate"]["experts"] == ["feeling", "about"]
    assert manifest["tasks"]["mood"] == {
        **read_manifest(mixed)["tasks"]["mood"],
        "expert": "feeling",
        "shared": "everyone",
    }
    assert "everyone  3     8      18      0.02  mood, about" in describe_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(("name", "task"), [("mood", "about"), ("about", "mood"), ("common", "mood")])
def test_an_expert_that_a_mixed_task_needs_is_not_removed(mixed, tmp_path, name, task):
    with pytest.raises(
        ConfigError, match=rf"Task '{task}' was trained with the gate mixing '{name}' in, .*Train it anew"
    ):
        edit(mixed, remove=[name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_beside_the_mixed_ones_goes_and_the_gate_stays(mixed, tmp_path):
    before = answers(mixed)
    result = edit(mixed, remove=["names"], output=tmp_path / "out")
    assert result.changes[1] == (
        "The gate is kept as it is, for tasks 'mood', 'about'; it does not know other experts than before."
    )
    assert_bit_identical({name: before[name] for name in ("mood", "about")}, answers(tmp_path / "out"))


def test_a_copy_of_a_task_with_a_shared_expert_answers_alike(tmp_path, make_model):
    path = saved(tmp_path / "first", make_model, "bert", heads={"mood": HEADS["mood"], "about": HEADS["about"]})
    loaded = load_checkpoint(path)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], shared="about")
    save_checkpoint(
        tmp_path / "shared", model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics
    )
    copied = sparse_ft.load(edit(tmp_path / "shared", copy=[("mood", "twin")], output=tmp_path / "out").path)
    texts = ["the table loved", "music"]
    torch.testing.assert_close(copied.logits(texts, "twin"), copied.logits(texts, "mood"))
    assert not torch.allclose(copied.logits(texts, "twin"), sparse_ft.load(path).logits(texts, "mood"), atol=1e-3)


def test_copies_and_new_experts_change_no_mixed_answer(mixed, tmp_path, make_model):
    other, before = saved(tmp_path / "other", make_model, "bert", seed=2), answers(mixed)
    add = [("big", other / "experts/about")]
    result = edit(mixed, copy=[("mood", "mood2"), ("names", "names2")], add=add, output=tmp_path / "out")
    assert result.changes[0] == "Copied expert 'mood' to 'mood2'; it serves no task."
    assert "Copied expert 'names' to 'names2', which serves task 'names2'." in result.changes
    after = answers(tmp_path / "out")
    assert_bit_identical(before, {name: after[name] for name in before})
    assert torch.equal(after["names"], after["names2"])
    assert set(after) == {*HEADS, "names2", "big"}


@pytest.mark.parametrize("name", ["about", "common"])
def test_pruning_a_mixed_expert_drops_the_scores_of_all_that_mix_it(mixed, tmp_path, name):
    edit(mixed, prune=[(name, 2)], output=tmp_path / "out")
    assert read_metrics(tmp_path / "out").keys() == {"names"}
    before, after = answers(mixed), answers(tmp_path / "out")
    assert torch.equal(before["names"], after["names"])
    assert not torch.equal(before["mood"], after["mood"])


@pytest.mark.parametrize("part", ["", "experts/about"])
def test_mixed_experts_do_not_serve_elsewhere(mixed, tmp_path, make_model, part):
    home = saved(tmp_path / "home", make_model, "bert", heads={"names": HEADS["names"]})
    message = r"Task '(mood|about)' of .* was trained with the gate there mixing several experts, .*Train the task anew"
    with pytest.raises(CheckpointError, match=message):
        edit(home, add=[(None, mixed / part)], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = edit(home, add=[("names2", mixed / "experts/names")], output=tmp_path / "out").changes
    assert said == [f"Added 'names2' from {str(mixed)!r}, which serves task 'names2'."]
