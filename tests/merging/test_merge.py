"""The merge command: what becomes of experts, heads, tasks and names, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from toy_checkpoints import HEADS, LABELS, answers, assert_bit_identical, disk, logits, saved, saved_joint
from toys import call, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest, read_metrics
from sparse_ft.errors import CheckpointError, ConfigError, DataError
from sparse_ft.experts.gates import PrototypeGate
from sparse_ft.merging.merge import merge
from sparse_ft.merging.merged_expert import merge_experts, merge_settings


@pytest.fixture
def bert(tmp_path, make_model):
    return saved(tmp_path / "first", make_model, "bert")


@pytest.fixture
def other(tmp_path, make_model):
    """The same tasks, with other numbers."""
    return saved(tmp_path / "second", make_model, "bert", seed=2)


def change(path: Path, **changes) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def relabelled(checkpoint: Path, task: str, labels: list[str], **changes) -> None:
    """Give a task of a checkpoint other labels."""
    file = checkpoint / "tasks" / f"{task}.yaml"
    change(file, labels=labels, **changes)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["bytes"][f"tasks/{task}.yaml"] = file.stat().st_size
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def head(checkpoint: Path, task: str) -> torch.Tensor:
    return load_checkpoint(checkpoint).model.head(task).linear.weight


# Into one expert


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_one_expert_serves_all_tasks_with_their_own_heads(tmp_path, make_model, family):
    path = saved(tmp_path / "first", make_model, family)
    before = disk(path)
    result = merge([path], method="linear", weights=[1, 2, 1], output=tmp_path / "out")
    assert disk(path) == before
    source, loaded = load_checkpoint(path), load_checkpoint(tmp_path / "out")
    assert loaded.model.experts.names == ["merged"]
    assert {task: slot.experts for task, slot in loaded.model.tasks.items()} == dict.fromkeys(HEADS, ("merged",))
    for task in HEADS:
        assert torch.equal(loaded.model.head(task).linear.weight, source.model.head(task).linear.weight)
        assert loaded.tasks[task] == source.tasks[task]
    experts = [source.model.experts.get(name) for name in HEADS]
    expected = merge_experts(experts, merge_settings("linear", num_experts=3, weights=[1, 2, 1]), name="merged")
    found = loaded.model.experts.get("merged")
    for module, (lora_a, lora_b) in expected.expert.deltas.items():
        assert torch.equal(found.deltas[module][0], lora_a)
        assert torch.equal(found.deltas[module][1], lora_b)
    assert torch.equal(found.word_shapes, expected.expert.word_shapes)
    assert (result.error, result.errors) == (expected.error, expected.errors)
    assert loaded.config.sources == source.config.sources
    assert loaded.metrics == {}  # the scores of the single experts are no longer true
    assert result.changes == ["Merged 3 experts by linear (weights mood 1, about 2, names 1) into 'merged' of rank 18."]


def test_all_weight_on_one_answers_as_that_one(bert, tmp_path):
    merge([bert], method="task_arithmetic", weights=[0, 1, 0], output=tmp_path / "out")
    found, expected = answers(tmp_path / "out")["about"], answers(bert)["about"]
    assert torch.allclose(found, expected, atol=1e-4)


def test_word_shapes_stay_in_the_block_where_they_were_learnt(bert, tmp_path):
    own = load_checkpoint(bert).model.experts
    assert own.get("names").shapes_block > own._block_of(next(iter(own.get("mood").deltas)))
    merge([bert], method="task_arithmetic", weights=[1e-6, 0, 1], output=tmp_path / "out")
    merged = load_checkpoint(tmp_path / "out").model.experts.get("merged")
    assert merged.shapes_block == own.get("names").shapes_block
    assert torch.allclose(answers(tmp_path / "out")["names"], answers(bert)["names"], atol=1e-4)


def test_word_shapes_of_different_blocks_do_not_merge(bert, other, tmp_path):
    loaded = load_checkpoint(other)
    tagger = loaded.model.experts.get("names")
    loaded.model.experts.replace(replace(tagger, shapes_block=tagger.shapes_block + 1))
    resave(loaded)
    assert load_checkpoint(other).model.experts.get("names").shapes_block == tagger.shapes_block + 1
    message = "Experts 'names' and 'names-2' see how words are written in different blocks, 2 and 3."
    with pytest.raises(ConfigError, match=message):
        merge([bert / "experts/names", other / "experts/names"], method="linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def resave(loaded) -> None:
    """Write a checkpoint over itself."""
    save_checkpoint(loaded.path, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)


def test_merging_with_itself_answers_as_before_whatever_the_names(bert, tmp_path):
    names = bert / "experts/names"
    result = merge([names, names], method="ties", density=1.0, output=tmp_path / "out", name="both")
    assert read_manifest(tmp_path / "out")["tasks"].keys() == {"names"}
    assert torch.allclose(answers(tmp_path / "out")["names"], answers(bert)["names"], atol=1e-4)
    assert result.changes == [
        "Merged 2 experts by ties (weights names 0.5, names-2 0.5; density 1) into 'both' of rank 6.",
        "Task 'names' is made of 'names', 'names-2', which have the same labels; its head is the average of theirs.",
    ]


@pytest.mark.parametrize("method", ["stack", "linear"])
def test_a_seed_is_refused_where_nothing_is_random(bert, tmp_path, method):
    with pytest.raises(ConfigError, match="has no use for --seed"):
        merge([bert], method=method, seed=99, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_random_method_is_determined_by_its_seed(bert, tmp_path):
    for folder, seed in (("one", 1), ("again", 1), ("two", 2)):
        merge([bert], method="dare", seed=seed, output=tmp_path / folder)
    one, again, two = (disk_of_experts(tmp_path / folder) for folder in ("one", "again", "two"))
    assert one == again != two


def disk_of_experts(path: Path) -> bytes:
    return (path / "experts/merged/adapter_model.safetensors").read_bytes()


def test_it_answers_in_a_new_process(toys, tmp_path):
    merge([toys], method="linear", output=tmp_path / "out")
    here = sparse_ft.load(tmp_path / "out", device="cpu").predict(["I loved the film"], tasks=["mood", "names"])
    code = "import json, sys, sparse_ft; print(json.dumps([p.to_dict() for p in sparse_ft.load(sys.argv[1], " \
        "device='cpu').predict(['I loved the film'], tasks=['mood', 'names'])]))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    there = json.loads(done.stdout)[0]["tasks"]
    assert there["mood"]["label"] == here[0].tasks["mood"]["label"]
    assert there["mood"]["score"] == pytest.approx(here[0].tasks["mood"]["score"], abs=1e-6)
    places = [[(e["type"], e["start"], e["end"]) for e in one["names"]["entities"]] for one in (there, here[0].tasks)]
    assert places[0] == places[1]


# Heads of tasks with the same labels


@pytest.fixture
def moods(bert, other):
    """The experts of one task from two checkpoints, the labels of the second in another order."""
    relabelled(other, "mood", ["good", "bad"])
    return [bert / "experts/mood", other / "experts/mood"]


def test_heads_of_the_same_labels_are_averaged_label_by_label(bert, other, moods, tmp_path):
    merge(moods, method="linear", weights=[3, 1], output=tmp_path / "out")
    expected = 0.75 * head(bert, "mood") + 0.25 * head(other, "mood").flip(0)
    assert torch.allclose(head(tmp_path / "out", "mood"), expected, atol=1e-7)
    assert load_checkpoint(tmp_path / "out").tasks["mood"].label_names == LABELS["mood"]


def test_tags_are_matched_by_their_names(bert, other, tmp_path):
    relabelled(other, "names", ["LOC", "PER"])  # O, then B and I of each type
    experts = [bert / "experts/names", other / "experts/names"]
    merge(experts, method="linear", output=tmp_path / "out")
    expected = (head(bert, "names") + head(other, "names")[[0, 3, 4, 1, 2]]) / 2
    assert torch.allclose(head(tmp_path / "out", "names"), expected, atol=1e-7)


def test_an_expert_that_is_taken_out_has_no_say_in_the_head(bert, other, moods, tmp_path):
    merge(moods, method="task_arithmetic", weights=[1, -0.5], output=tmp_path / "out")
    assert torch.equal(head(tmp_path / "out", "mood"), head(bert, "mood"))


def test_the_head_of_one_expert_may_be_chosen(other, moods, tmp_path):
    result = merge(moods, method="linear", heads="mood-2", output=tmp_path / "out")
    assert torch.equal(head(tmp_path / "out", "mood"), head(other, "mood").flip(0))
    assert result.changes[1].endswith("its head is that of 'mood-2'.")


def test_tasks_may_be_kept_apart(bert, other, moods, tmp_path):
    merge([moods[0], ("tone", moods[1])], method="linear", heads="separate", output=tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert list(loaded.tasks) == ["mood", "tone"]
    assert torch.equal(loaded.model.head("tone").linear.weight, head(other, "mood"))
    with pytest.raises(ConfigError, match="Two tasks are named 'mood', kept apart by --heads separate: of the experts"):
        merge(moods, method="linear", heads="separate", output=tmp_path / "no")


def test_other_labels_under_one_name_are_refused_until_one_is_renamed(bert, other, tmp_path):
    relabelled(other, "mood", ["sad", "happy"])
    experts = [bert / "experts/mood", other / "experts/mood"]
    with pytest.raises(
        ConfigError,
        match=r"Two tasks are named 'mood', of another kind, language or labels: .*NAME=CHECKPOINT/experts/",
    ):
        merge(experts, method="linear", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge([experts[0], ("feeling", experts[1])], method="linear", output=tmp_path / "out")
    assert list(load_checkpoint(tmp_path / "out").tasks) == ["mood", "feeling"]


# Stack


def test_stack_keeps_every_bit_and_routes(toys, tmp_path):
    parts = [toys / "experts" / name for name in ("mood", "names", "about")]
    result = merge(parts, method="stack", output=tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert_bit_identical(logits(toys, "mood", "names", "about"), logits(loaded, "mood", "names", "about"))
    gate = loaded.model.gate
    assert isinstance(gate, PrototypeGate)
    assert gate.names == ["mood", "names", "about"]
    assert result.changes[-1].startswith(
        "Fitted a prototype gate on the training texts; right on validation rows: mood"
    )
    routed = sparse_ft.evaluate(tmp_path / "out", route="gate", device="cpu").routing
    assert routed.accuracy > 0.8  # "mood" and "about" share most of their words
    scores = read_metrics(tmp_path / "out")
    assert scores["mood"]["metrics"] == read_metrics(toys)["mood"]["metrics"]
    assert (result.error, result.errors) == (None, {})


def test_stack_renames_and_goes_without_a_gate_where_texts_are_missing(bert, other, tmp_path):
    with pytest.raises(ConfigError, match=r"There is an expert named 'mood' already: .* NAME=.*second.*experts.mood"):
        merge([bert, other / "experts/mood"], method="stack", output=tmp_path / "out")
    shutil.rmtree(tmp_path / "first/about")
    result = merge([bert, ("mood2", other / "experts/mood")], method="stack", output=tmp_path / "out")
    assert result.changes[-1].startswith("There is no gate, for want of the training texts of task 'about'.")
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.model.gate is None
    assert_bit_identical(logits(bert, *HEADS), logits(loaded, *HEADS))
    assert torch.equal(answers(other)["mood"], answers(tmp_path / "out")["mood2"])


# Scores


def test_evaluate_compares_every_task_with_its_expert(toys, tmp_path):
    parts = [toys / "experts/mood", toys / "experts/names"]
    result = merge(parts, method="linear", output=tmp_path / "out", evaluate=True, device="cpu")
    assert list(result.scores) == ["mood", "names"]
    for checkpoint, place in ((toys, "before"), (tmp_path / "out", "after")):
        scores = sparse_ft.evaluate(checkpoint, tasks=["mood", "names"], device="cpu").tasks
        for task, entry in result.scores.items():
            assert getattr(entry, place) == scores[task].score.metrics[entry.metric]
            if place == "after":
                assert read_metrics(checkpoint)[task]["metrics"] == scores[task].score.metrics
    lines = result.to_text().splitlines()
    assert lines[-3].split() == ["task", "metric", "before", "after", "change"]
    assert [line.split()[:2] for line in lines[-2:]] == [["mood", "accuracy"], ["names", "f1"]]


def test_scores_without_rows_leave_nothing_behind(bert, tmp_path):
    shutil.rmtree(tmp_path / "first/about")
    with pytest.raises(DataError):
        merge([bert], method="linear", output=tmp_path / "out", evaluate=True, device="cpu")
    assert not (tmp_path / "out").exists()


# The command line


def test_the_command_says_what_it_did(monkeypatch, capsys, tmp_path, toys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        monkeypatch, capsys, "merge", toys / "experts/mood", f"tagger={toys}/experts/names", "--method",
        "task_arithmetic", "--weights", "1,-0.5", "--rank", "3", "--output", "out",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "Merged 2 experts by task_arithmetic (weights mood 1, tagger -0.5) into 'merged' of rank 3."
    assert lines[1].startswith("Relative error of the deltas by the rank: 0.")
    assert len(lines) == 2 + 18 + 3
    assert lines[-2:] == ["Checkpoint: out", "Next: sparse-ft evaluate out"]
    code, out, err = call(monkeypatch, capsys, "evaluate", "out", "--task", "tagger")
    assert code == 0, err
    code, out, err = call(monkeypatch, capsys, "predict", "out", "I loved the film")
    assert code == 0, err


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, toys):
    monkeypatch.chdir(tmp_path)

    def check(*arguments, said: str) -> None:
        before = disk(tmp_path)
        code, out, err = call(monkeypatch, capsys, "merge", *[str(part).format(toys=toys) for part in arguments])
        assert (code, out) == (2, ""), err
        assert said in err.splitlines()[-1]
        assert "Traceback" not in err
        assert disk(tmp_path) == before

    return check


OUT = ("--output", "out")


@pytest.mark.parametrize(("arguments", "said"), [
    (["{toys}", "--method", "tise"], "Unknown merge method 'tise'. Did you mean 'ties'? Known: stack, linear"),
    (["{toys}", "--method", "linear", "--weights", "1,2"], "--weights 1,2 has 2 numbers for 4 experts."),
    (["{toys}", "--method", "linear", "--weights", "1;2"], "--weights '1;2' is no list of numbers. Write e.g."),
    (["{toys}", "--method", "linear", "--weights", "1,nan,1,1"], "expected finite numbers that are not all zero"),
    (["{toys}", "--method", "ties", "--density", "0"], "--density is 0. Expected a share above 0, up to 1."),
    (["{toys}", "--method", "ties", "--density", "1.1"], "--density is 1.1."),
    (["{toys}", "--method", "slerp"], "slerp merges 2 experts, and there are 4."),
    (["{toys}/experts/mood", "--method", "linear"], "There is only one expert to merge."),
    (["{toys}/experts/moods", "--method", "linear"], "Unknown expert of"),
    (["nowhere", "--method", "linear"], "None of 'nowhere' is a checkpoint or CHECKPOINT/experts/NAME."),
    (["{toys}", "nowhere", "--method", "linear"], "'nowhere' does not exist."),
    (["x={toys}", "--method", "linear"], "which cannot all be named 'x'"),
    (["{toys}", "--method", "linear", "--name", "a/b"], "The name 'a/b' is not allowed"),
    (["{toys}", "--method", "linear", "--heads", "moot"], "Unknown choice of --heads 'moot'. Did you mean 'mood'?"),
    (["{toys}", "--method", "stack", "--rank", "4"], "stack keeps all experts as they are and has no use for --rank."),
    (["{toys}", "--method", "stack", "--search"], "stack keeps all experts as they are and has no use for --search."),
    (["{toys}", "--method", "svd"], "give --rank N or --energy 0.99."),
    (["{toys}", "--method", "ties", "--search", "--weights", "1,1,1,1"], "--search finds weights and density"),
    (["{toys}", "--method", "linear", "--evaluate", "--split", "dev"], "Unknown split 'dev'"),
    (["{toys}", "--method", "linear", "--split", "test"], "--split test means something with --evaluate only."),
    (["{toys}", "--method", "ties", "--budget", "50"], "--budget 50 means something with --search only. Add --search"),
    (["{toys}", "--method", "ties", "--rows", "50"], "--rows 50 means something with --search only."),
    (["{toys}", "--method", "linear", "--evaluate", "--data", "mod=x"], "Unknown task in --data 'mod'"),
])  # fmt: skip
def test_a_mistake_is_one_paragraph_and_exit_code_two(refused, arguments, said):
    refused(*arguments, *OUT, said=said)


def test_an_output_that_exists_is_refused(refused, tmp_path, toys):
    shutil.copytree(toys, tmp_path / "out")
    refused("{toys}", "--method", "linear", *OUT, said="'out' holds a checkpoint already.")


def test_another_backbone_or_pooling_is_refused(refused, bert, tmp_path, make_model, tiny_folder, toys):
    strange = saved(tmp_path / "strange", make_model, tiny_folder("bert", seed=1))
    refused("{toys}", strange, "--method", "linear", *OUT, said="were trained on the backbone")
    first = saved(tmp_path / "pooled", make_model, "bert", pooling="first")
    refused(bert, first, "--method", "linear", *OUT, said="reads first pooling; this checkpoint has unit.")


def test_damaged_numbers_are_refused(refused, bert, tmp_path):
    import safetensors.torch

    file = bert / "experts/mood/adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    refused(bert, "--method", "linear", *OUT, said="holds NaN or infinite numbers")


@pytest.mark.parametrize("method", ["stack", "linear"])
def test_another_tokenizer_is_refused(refused, bert, other, method):
    loaded = load_checkpoint(other)
    loaded.model.backbone.tokenizer.backend_tokenizer.post_processor = None  # no [CLS], no [SEP]
    resave(loaded)
    refused(bert, other / "experts/names", "--method", method, *OUT, said="the same text gives other tokens")


@pytest.mark.parametrize("method", ["stack", "linear"])
def test_a_task_with_a_shared_expert_is_refused(refused, bert, other, method):
    loaded = load_checkpoint(other)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], shared="about")
    resave(loaded)
    refused(bert, other, "--method", method, *OUT, said="Task 'mood' of")
    refused(
        bert, other / "experts/about", "--method", method, *OUT, said="was trained with the shared expert 'about' in it"
    )


def test_tasks_in_different_languages_stay_apart(bert, other, tmp_path):
    relabelled(other, "names", LABELS["names"], language="zh")
    with pytest.raises(ConfigError, match="Two tasks are named 'names'"):
        merge([bert / "experts/names", other / "experts/names"], method="linear", output=tmp_path / "out")
    merge([bert / "experts/names", ("zh", other / "experts/names")], method="linear", output=tmp_path / "out")
    assert {name: spec.language for name, spec in load_checkpoint(tmp_path / "out").tasks.items()} == {
        "names": "en",
        "zh": "zh",
    }


def test_an_output_that_is_a_link_is_written_where_it_leads(bert, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    result = merge([bert], method="linear", output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert result.path == tmp_path / "far"
    assert load_checkpoint(tmp_path / "link").tasks.keys() == HEADS.keys()


@pytest.mark.parametrize("method", ["stack", "linear"])
def test_tasks_that_a_gate_mixes_are_refused(tmp_path, make_model, method):

    mixed = saved_joint("sequence", tmp_path / "first", make_model)
    with pytest.raises(CheckpointError, match="was trained with the gate there mixing several experts"):
        merge([mixed], method=method, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_of_peft_is_merged_in_without_a_task(bert, tmp_path):
    adapter = bert / "experts/names"
    shutil.copytree(adapter, tmp_path / "plain")
    merge([bert / "experts/mood", tmp_path / "plain"], method="cat", output=tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest["tasks"]) == ["mood"]
    assert manifest["experts"]["merged"]["rank"] == 10


def test_the_toy_data_may_be_elsewhere(bert, tmp_path):
    shutil.rmtree(tmp_path / "first/about")
    write_toy(tmp_path / "moved", "about", sizes=(6, 4, 4), labels=LABELS["about"])
    merge(
        [bert], method="linear", output=tmp_path / "out", evaluate=True, device="cpu",
        data={"about": str(tmp_path / "moved/about")},
    )  # fmt: skip
    assert load_checkpoint(tmp_path / "out").config.sources["about"] == str(tmp_path / "moved/about")
