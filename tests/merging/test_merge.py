"""The merge command: what becomes of experts, heads, tasks and names, and what is refused."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from toy_checkpoints import HEADS, LABELS, answers, assert_bit_identical, disk, logits, saved, saved_joint, sign
from toys import call, write_toy

import sparse_ft
from sparse_ft.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from sparse_ft.checkpoint.manifest import read_manifest, read_metrics
from sparse_ft.errors import ConfigError, DataError
from sparse_ft.experts.gates import PrototypeGate
from sparse_ft.merging.merge import merge
from sparse_ft.merging.merged_expert import merge_experts
from sparse_ft.merging.settings import merge_settings


@pytest.fixture(scope="module")
def bert(tmp_path_factory, make_model):
    """A checkpoint that no test changes."""
    return saved(tmp_path_factory.mktemp("first"), make_model, "bert")


@pytest.fixture(scope="module")
def second(tmp_path_factory, make_model):
    return saved(tmp_path_factory.mktemp("second"), make_model, "bert", seed=2)


@pytest.fixture
def other(second, tmp_path):
    """A copy of the same tasks with other numbers."""
    return shutil.copytree(second, tmp_path / "second")


def relabelled(checkpoint: Path, task: str, labels: list[str], **changes) -> Path:
    """Give a task of a checkpoint other labels; return the folder of its expert."""
    file = checkpoint / "tasks" / f"{task}.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "labels": labels, **changes}))
    return sign(checkpoint) / "experts" / task


def resave(loaded) -> None:
    """Write a checkpoint over itself."""
    save_checkpoint(loaded.path, model=loaded.model, tasks=loaded.tasks, config=loaded.config, metrics=loaded.metrics)


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
    expected = merge_experts(experts, merge_settings({"method": "linear", "weights": [1, 2, 1]}))
    written = loaded.model.experts.get("merged")
    for module, pair in expected.expert.deltas.items():
        assert all(map(torch.equal, written.deltas[module], pair))
    assert torch.equal(written.word_shapes, expected.expert.word_shapes)
    assert (result.error, result.errors) == (expected.error, expected.errors)
    assert loaded.config.sources == source.config.sources
    assert loaded.metrics == {}  # the scores of the single experts are no longer true


def test_all_weight_on_one_answers_as_that_one(bert, tmp_path):
    for task, weights in (("about", [0, 1, 0]), ("names", [1e-6, 0, 1])):
        merge([bert], method="task_arithmetic", weights=weights, output=tmp_path / task)
        assert torch.allclose(answers(tmp_path / task)[task], answers(bert)[task], atol=1e-4)
    experts = load_checkpoint(tmp_path / "names").model.experts  # word shapes stay in the block where they were learnt
    assert experts.get("merged").shapes_block == load_checkpoint(bert).model.experts.get("names").shapes_block


def test_merging_with_itself_answers_as_before_whatever_the_names(bert, tmp_path):
    names = bert / "experts/names"
    result = merge([names, names], method="ties", density=1.0, output=tmp_path / "out", name="both")
    assert read_manifest(tmp_path / "out").tasks.keys() == {"names"}
    assert torch.allclose(answers(tmp_path / "out")["names"], answers(bert)["names"], atol=1e-4)
    assert result.changes[0] == (
        "Merged 2 experts by ties (weights names 0.5, names-2 0.5; density 1) into 'both' of rank 6."
    )


def test_a_random_method_is_determined_by_its_seed(bert, tmp_path):
    files = []
    for folder, seed in (("one", 1), ("again", 1), ("two", 2)):
        merge([bert], method="dare", seed=seed, output=tmp_path / folder)
        files.append((tmp_path / folder / "experts/merged/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_lora_of_peft_is_merged_in_without_a_task(bert, tmp_path):
    shutil.copytree(bert / "experts/names", tmp_path / "plain")
    merge([bert / "experts/mood", tmp_path / "plain"], method="cat", output=tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.tasks) == ["mood"]
    assert manifest.experts["merged"].rank == 10
    stacked = merge([bert / "experts/mood", tmp_path / "plain"], method="stack", output=tmp_path / "stacked")
    assert "'plain'" in stacked.changes[-1]
    assert load_checkpoint(tmp_path / "stacked").model.gate is None  # no texts belong to it


# Heads of tasks with the same labels


def test_heads_of_the_same_labels_are_averaged_label_by_label(bert, other, tmp_path):
    moods = [bert / "experts/mood", relabelled(other, "mood", ["good", "bad"])]
    ours, theirs = head(bert, "mood"), head(other, "mood").flip(0)
    merge(moods, method="linear", weights=[3, 1], output=tmp_path / "out")
    assert torch.allclose(head(tmp_path / "out", "mood"), 0.75 * ours + 0.25 * theirs, atol=1e-7)
    assert load_checkpoint(tmp_path / "out").tasks["mood"].label_names == LABELS["mood"]
    merge(moods, method="task_arithmetic", weights=[1, -0.5], output=tmp_path / "taken out")  # it has no say
    assert torch.equal(head(tmp_path / "taken out", "mood"), ours)
    merge(moods, method="linear", heads="mood-2", output=tmp_path / "chosen")
    assert torch.equal(head(tmp_path / "chosen", "mood"), theirs)
    merge([moods[0], ("tone", moods[1])], method="linear", heads="separate", output=tmp_path / "apart")
    loaded = load_checkpoint(tmp_path / "apart")
    assert list(loaded.tasks) == ["mood", "tone"]
    assert torch.equal(loaded.model.head("tone").linear.weight, head(other, "mood"))


def test_tags_are_matched_by_their_names(bert, other, tmp_path):
    experts = [bert / "experts/names", relabelled(other, "names", ["LOC", "PER"])]  # O, then B and I of each type
    merge(experts, method="linear", output=tmp_path / "out")
    expected = (head(bert, "names") + head(other, "names")[[0, 3, 4, 1, 2]]) / 2
    assert torch.allclose(head(tmp_path / "out", "names"), expected, atol=1e-7)


@pytest.mark.parametrize(("task", "labels", "changes", "heads"), [
    ("mood", ["sad", "happy"], {}, None),
    ("mood", ["good", "bad"], {}, "separate"),
    ("names", LABELS["names"], {"language": "zh"}, None),
])  # fmt: skip
def test_unlike_tasks_of_one_name_are_refused_until_one_is_renamed(bert, other, tmp_path, task, labels, changes, heads):
    experts = [bert / "experts" / task, relabelled(other, task, labels, **changes)]
    with pytest.raises(ConfigError, match=rf"Two tasks are named '{task}'.*NAME=CHECKPOINT/experts/"):
        merge(experts, method="linear", heads=heads, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge([experts[0], ("renamed", experts[1])], method="linear", heads=heads, output=tmp_path / "out")
    assert list(load_checkpoint(tmp_path / "out").tasks) == [task, "renamed"]


# Stack


def test_stack_keeps_every_bit_and_routes(toys, tmp_path):
    parts = [toys / "experts" / name for name in ("mood", "names", "about")]
    result = merge(parts, method="stack", output=tmp_path / "out", evaluate=True, device="cpu")
    loaded = load_checkpoint(tmp_path / "out")
    assert_bit_identical(logits(toys, "mood", "names", "about"), logits(loaded, "mood", "names", "about"))
    gate = loaded.model.gate
    assert isinstance(gate, PrototypeGate)
    assert gate.names == ["mood", "names", "about"]
    assert read_metrics(tmp_path / "out")["mood"]["metrics"] == read_metrics(toys)["mood"]["metrics"]
    assert (result.error, result.errors) == (None, {})
    routed = sparse_ft.evaluate(tmp_path / "out", route="gate", device="cpu")
    assert routed.routing.accuracy > 0.8
    for task, entry in result.scores.items():
        assert entry.before == read_metrics(toys)[task]["metrics"][entry.metric]
        assert entry.after == routed.tasks[task].score.metrics[entry.metric]


def test_stack_renames_and_goes_without_a_gate_where_texts_are_missing(bert, other, tmp_path):
    with pytest.raises(ConfigError, match=r"There is an expert named 'mood' already: .* NAME=.*second.*experts.mood"):
        merge([bert, other / "experts/mood"], method="stack", output=tmp_path / "out")
    loaded = load_checkpoint(other)
    loaded.config = loaded.config.model_copy(update={"sources": {"mood": str(tmp_path / "gone")}})
    resave(loaded)
    result = merge([bert, ("mood2", other / "experts/mood")], method="stack", output=tmp_path / "out")
    assert result.changes[-1].startswith("There is no gate")
    stacked = load_checkpoint(tmp_path / "out")
    assert stacked.model.gate is None
    assert_bit_identical(logits(bert, *HEADS), logits(stacked, *HEADS))
    assert torch.equal(answers(other)["mood"], answers(tmp_path / "out")["mood2"])


# Scores


def test_evaluate_compares_every_task_with_its_expert(bert, tmp_path):
    write_toy(tmp_path / "moved", "about", sizes=(6, 4, 4), labels=LABELS["about"])
    moved = {"about": str(tmp_path / "moved/about")}
    result = merge([bert], method="linear", output=tmp_path / "out", evaluate=True, data=moved, device="cpu")
    assert load_checkpoint(tmp_path / "out").config.sources["about"] == moved["about"]
    for checkpoint, moment in ((bert, "before"), (tmp_path / "out", "after")):
        scores = sparse_ft.evaluate(checkpoint, data=moved, device="cpu").tasks
        for task, entry in result.scores.items():
            assert getattr(entry, moment) == scores[task].score.metrics[entry.metric]
            if moment == "after":
                assert read_metrics(checkpoint)[task]["metrics"] == scores[task].score.metrics
    assert [line.split()[:2] for line in result.to_text().splitlines()[-4:]] == [
        ["task", "metric"], ["mood", "accuracy"], ["about", "accuracy"], ["names", "f1"],
    ]  # fmt: skip


def test_scores_without_rows_leave_nothing_behind(bert, tmp_path):
    with pytest.raises(DataError):
        merge([bert], method="linear", output=tmp_path / "out", evaluate=True, data={"about": str(tmp_path / "gone")})
    assert not (tmp_path / "out").exists()


# The command line


def test_the_command_says_what_it_did(monkeypatch, capsys, tmp_path, bert):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        monkeypatch, capsys, "merge", bert / "experts/mood", f"tagger={bert}/experts/names", "--method",
        "task_arithmetic", "--weights", "1,-0.5", "--rank", "3", "--output", "out",
    )  # fmt: skip
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "Merged 2 experts by task_arithmetic (weights mood 1, tagger -0.5) into 'merged' of rank 3."
    assert len(lines) == 2 + 18 + 3  # the error of each layer
    assert lines[-2:] == ["Checkpoint: out", "Next: sparse-ft evaluate out"]
    code, out, err = call(monkeypatch, capsys, "predict", "out", "I loved the film", "--task", "all")
    assert code == 0, err


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def check(*arguments, said: str) -> None:
        before = disk(tmp_path)
        code, out, err = call(monkeypatch, capsys, "merge", *arguments)
        assert (code, out) == (2, ""), err
        assert said in err.splitlines()[-1]
        assert "Traceback" not in err
        assert disk(tmp_path) == before

    return check


@pytest.mark.parametrize(("arguments", "said"), [
    ("{bert} --method tise", "'tise'. Did you mean 'ties'? Known: stack, linear"),
    ("{bert} --method linear --weights 1,2", "--weights 1,2 has 2 numbers for 3 experts."),
    ("{bert} --method linear --weights '1;2'", "--weights '1;2'"),
    ("{bert} --method linear --weights 1,nan,1", "weights.1: Input should be a finite number"),
    ("{bert} --method linear --weights 0,0,0", "--weights 0,0,0"),
    ("{bert} --method ties --weights 1,-1,1", "--weights 1,-1,1: ties averages"),
    ("{bert} --method model_stock --weights 1,1,1", "model_stock has no use for --weights."),
    ("{bert} --method ties --density 0", "density: Input should be greater than 0"),
    ("{bert} --method ties --density 1.1", "density: Input should be less than or equal to 1"),
    ("{bert} --method dare --density nan", "density: Input should be"),
    ("{bert} --method linear --density 0.5", "linear has no use for --density."),
    ("{bert} --method cat --rank 4", "cat has no use for --rank."),
    ("{bert} --method cat --energy 0.5", "cat has no use for --energy."),
    ("{bert} --method svd", "--energy"),
    ("{bert} --method svd --rank 2 --energy 0.5", "--rank and --energy"),
    ("{bert} --method svd --energy 1.1", "energy: Input should be less than or equal to 1"),
    ("{bert} --method linear --rank 0", "rank: Input should be greater than or equal to 1"),
    ("{bert} --method slerp", "slerp merges 2 experts, and there are 3."),
    ("{bert}/experts/mood --method linear", "only one expert"),
    ("{bert}/experts/moods --method linear", "'moods'. Did you mean 'mood'?"),
    ("nowhere --method linear", "'nowhere'"),
    ("{bert} nowhere --method linear", "'nowhere' does not exist."),
    ("x={bert} --method linear", "'x'"),
    ("{bert} --method linear --name a/b", "'a/b'"),
    ("{bert} --method linear --heads moot", "'moot'. Did you mean 'mood'?"),
    ("{bert}/experts/mood {bert}/experts/names {bert}/experts/names --method linear --heads mood", "'names-2'"),
    ("{bert} --method stack --rank 4", "--rank"),
    ("{bert} --method stack --search", "--search"),
    ("{bert} --method stack --seed 9", "--seed"),
    ("{bert} --method linear --seed 9", "linear has no use for --seed. Leave it out, or choose dare"),
    ("{bert} --method ties --search --weights 1,1,1", "--search"),
    ("{bert} --method linear --evaluate --split dev", "'dev'"),
    ("{bert} --method linear --split test", "--split test"),
    ("{bert} --method ties --budget 50", "--budget 50"),
    ("{bert} --method ties --rows 50", "--rows 50"),
    ("{bert} --method linear --evaluate --data mod={bert}", "'mod'"),
    ("{bert} --method linear --output full", "'full' is not empty"),
])  # fmt: skip
def test_a_mistake_is_one_paragraph_and_exit_code_two(refused, bert, tmp_path, arguments, said):
    (tmp_path / "full/below").mkdir(parents=True)
    refused("--output", "out", *shlex.split(arguments.format(bert=bert)), said=said)


def other_backbone(checkpoint, make_model, tiny_folder):
    saved(checkpoint.parent / "strange", make_model, tiny_folder("bert", seed=1))
    shutil.rmtree(checkpoint)
    (checkpoint.parent / "strange/checkpoint").rename(checkpoint)


def other_pooling(checkpoint, make_model, _):
    saved(checkpoint.parent / "pooled", make_model, "bert", pooling="first")
    shutil.rmtree(checkpoint)
    (checkpoint.parent / "pooled/checkpoint").rename(checkpoint)


def damaged_numbers(checkpoint, *_):
    file = checkpoint / "experts/mood/adapter_model.safetensors"
    values = safetensors.torch.load_file(file)
    next(iter(values.values())).fill_(float("nan"))
    safetensors.torch.save_file(values, file, metadata={"format": "pt"})
    sign(checkpoint)


def other_tokenizer(checkpoint, *_):
    loaded = load_checkpoint(checkpoint)
    loaded.model.backbone.tokenizer.backend_tokenizer.post_processor = None  # no [CLS], no [SEP]
    resave(loaded)


def shared_expert(checkpoint, *_):
    loaded = load_checkpoint(checkpoint)
    loaded.model.tasks["mood"] = replace(loaded.model.tasks["mood"], shared="about")
    resave(loaded)


def mixing_gate(checkpoint, make_model, _):
    mixed = saved_joint("sequence", checkpoint.parent / "third", make_model)
    shutil.rmtree(checkpoint)
    mixed.rename(checkpoint)


def other_block_of_word_shapes(checkpoint, *_):
    loaded = load_checkpoint(checkpoint)
    tagger = loaded.model.experts.get("names")
    loaded.model.experts.replace(replace(tagger, shapes_block=tagger.shapes_block + 1))
    resave(loaded)


@pytest.mark.parametrize(("change", "method", "said"), [
    (other_backbone, "linear", "were trained on the backbone"),
    (other_pooling, "linear", "first pooling"),
    (damaged_numbers, "linear", "NaN"),
    (other_tokenizer, "stack", "tokens"),
    (shared_expert, "stack", "Task 'mood'"),
    (shared_expert, "linear", "Task 'mood'"),
    (mixing_gate, "stack", "several experts"),
    (mixing_gate, "linear", "several experts"),
    (other_block_of_word_shapes, "linear", "in different blocks, 2 and 3."),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_are_refused(refused, bert, other, make_model, tiny_folder, change, method, said):
    change(other, make_model, tiny_folder)
    refused(f"b={bert}/experts/names", other, "--method", method, "--output", "out", said=said)
