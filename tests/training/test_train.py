"""Training on toy tasks whose answer hangs on a few words, with tiny backbones."""

import json
import shutil
import weakref

import datasets
import pytest
import torch
import yaml
from toy_checkpoints import HEADS, equal, logits_of, saved, tensors, trainable_of
from toys import run, settings, toy_rows, write_rows, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone, set_attention
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.config import RunConfig, load_config
from sparse_ft.errors import BackboneError, ConfigError, DataError, SparseFTError
from sparse_ft.tasks.kinds.classification import Classification
from sparse_ft.tasks.spec import TaskSpec
from sparse_ft.training import loop as fitting
from sparse_ft.training import train as training

ONE = {"overrides": settings(train__epochs=1), "device": "cpu"}
"""Of a further run, of one epoch."""


@pytest.fixture(scope="module")
def old(tmp_path_factory, make_model):
    """A checkpoint to start from, with random experts and toy tasks of two rows; read-only."""
    return saved(tmp_path_factory.mktemp("old"), make_model, "bert")


@pytest.fixture
def caught_model(monkeypatch):
    """The model as it is when the checkpoint is written."""
    caught, save = [], training.save_checkpoint

    def catch(path, *, model, **rest):
        caught.append(model)
        save(path, model=model, **rest)

    monkeypatch.setattr(training, "save_checkpoint", catch)
    return caught


def small(folder, *names, size=8):
    return [write_toy(folder, name, sizes=(size, 4, 4)) for name in names]


# What is learnt


def test_every_kind_learns_a_task_that_can_be_learnt(toys):
    scores = json.loads((toys / "metrics.json").read_text())
    for name, metric in (("mood", "accuracy"), ("reply", "accuracy"), ("about", "micro_f1"), ("names", "f1")):
        assert scores[name]["metrics"][metric] >= 0.8, name
        assert scores[name]["split"] == "test"


def test_the_best_score_is_that_of_the_saved_checkpoint(toys):
    scores = json.loads((toys / "metrics.json").read_text())
    again = sparse_ft.evaluate(toys, split="validation", device="cpu").tasks
    for name, report in again.items():
        metric = report.score.metrics[sparse_ft.load(toys, device="cpu").tasks[name].metric]
        assert scores[name]["validation"] == pytest.approx(metric, abs=1e-12)


def test_minilm_learns_two_tasks_at_once(minilm_toys):
    scores = sparse_ft.evaluate(minilm_toys, device="cpu").tasks
    assert scores["mood"].score.metrics["accuracy"] > 0.8
    assert scores["names"].score.metrics["f1"] > 0.6


def test_pretrained_decoder_learns(tmp_path, stories260k):
    result = run([write_toy(tmp_path, "mood")], stories260k, tmp_path / "out", train__epochs=5, train__batch_size=8)
    assert result.scores["mood"]["accuracy"] > 0.6
    assert sparse_ft.load(result.path, device="cpu")("the table boring").tasks["mood"]["label"] == "bad"


@pytest.mark.parametrize(("family", "name"), [("bert", "about"), ("gpt2", "names"), ("deberta-v2", "mood")])
def test_every_family_trains_and_comes_back_the_same(tmp_path, tiny_folder, caught_model, family, name):
    path = run(small(tmp_path, name, size=16), tiny_folder(family), tmp_path / "out", train__epochs=1).path
    texts = ["the table loved", "", "Ada Lovelace in London and then a weather of at six", "half"]
    loaded, (trained,) = load_checkpoint(path), caught_model
    set_attention(loaded.model.backbone, trained.backbone.config._attn_implementation)
    now, then = logits_of(loaded.model, name, texts), logits_of(trained, name, texts)
    assert all(torch.equal(left, right) for left, right in zip(now, then, strict=True))
    assert not any(torch.equal(row[:1], now[0][:1]) for row in now[2:])  # the logits depend on the text
    assert any(lora_b.abs().max() > 0 for _, lora_b in loaded.model.experts.get(name).deltas.values())
    frozen = {key.replace(".frozen.", "."): tensor for key, tensor in trained.encoder.named_parameters()}
    for key, tensor in load_backbone(str(tiny_folder(family))).model.named_parameters():
        assert torch.equal(frozen[key], tensor), key


def test_a_bf16_backbone_trains_float32_experts(tmp_path, tiny_bert, caught_model):
    task = write_toy(tmp_path, "mood", sizes=(48, 4, 4))
    result = run([task], tiny_bert, tmp_path / "out", train__precision="bf16", train__epochs=5, train__batch_size=8)
    assert {value.dtype for value in trainable_of(caught_model[0], "mood").values()} == {torch.float32}
    assert caught_model[0].encoder.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors(result.path).values()} == {torch.float32}
    assert result.history[-1]["loss"]["mood"] < 0.8 * result.history[0]["loss"]["mood"]


# From a checkpoint: what is touched and what is not


def test_a_new_task_leaves_the_others_as_they_were(tmp_path, old):
    task = write_toy(tmp_path, "mood", sizes=(16, 8, 8), as_name="feeling")
    options = {**ONE, "overrides": settings(train__epochs=1, experts__rank=3)}
    new = sparse_ft.train([task], from_checkpoint=old, output=tmp_path / "new", **options).path
    for name in HEADS:
        for file in (f"experts/{name}/adapter_model.safetensors", f"experts/{name}/adapter_config.json",
                     f"heads/{name}.safetensors", f"tasks/{name}.yaml"):  # fmt: skip
            assert (old / file).read_bytes() == (new / file).read_bytes(), file
    texts = ["the table loved", "boring", "at six " * 30]
    before, after = sparse_ft.load(old, device="cpu"), sparse_ft.load(new, device="cpu")
    assert torch.equal(before.logits(texts, "mood"), after.logits(texts, "mood"))
    assert list(after.tasks) == [*HEADS, "feeling"]
    scores, present = (json.loads((folder / "metrics.json").read_text())["mood"] for folder in (old, new))
    assert {**present, **scores} == present  # and how often the gate, now that there is one, is right
    assert after.checkpoint.manifest.experts["feeling"].rank == 3


def test_a_task_of_the_checkpoint_is_trained_further_when_it_is_named(tmp_path, old):
    new = sparse_ft.train(["mood"], from_checkpoint=old, output=tmp_path / "new", **ONE).path
    before, after = tensors(old), tensors(new)
    changed = {name.split("/")[1].partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"mood"}


def test_the_labels_of_the_checkpoint_keep_their_order(tmp_path, old):
    turned = write_toy(tmp_path / "other", "mood", sizes=(8, 8, 8), labels=["good", "bad"])
    new = sparse_ft.train([turned], from_checkpoint=old, output=tmp_path / "new", **ONE)
    assert new.tasks["mood"].label_names == load_checkpoint(new.path).tasks["mood"].label_names == ["bad", "good"]


def test_tasks_of_the_checkpoint_read_as_much_of_a_text_as_before(tmp_path, make_model):
    config = RunConfig.model_validate({"data": {"max_length": 8}})
    old = saved(tmp_path / "old", make_model, "bert", heads={"mood": HEADS["mood"]}, config=config)
    tasks = small(tmp_path, "about")
    new = sparse_ft.train(tasks, from_checkpoint=old, output=tmp_path / "new", **ONE).path
    assert load_checkpoint(new).config.data.max_length == 8
    texts = ["the table loved " * 6]
    assert torch.equal(*(sparse_ft.load(folder, device="cpu").logits(texts, "mood") for folder in (old, new)))
    with pytest.raises(ConfigError, match=r"data\.max_length is 16, and 8 in .*'mood'"):
        sparse_ft.train(tasks, from_checkpoint=old, output=tmp_path / "out", overrides=["data.max_length=16"])


def test_the_backbone_of_the_checkpoint_may_have_moved(tmp_path, make_model, tiny_folder, tiny_bert):
    here, there = (shutil.copytree(tiny_bert, tmp_path / name) for name in ("here", "there"))
    old = saved(tmp_path / "old", make_model, here, heads={"mood": HEADS["mood"]})
    shutil.rmtree(here)
    tasks, start = small(tmp_path, "about"), {"from_checkpoint": old, **ONE}
    path = sparse_ft.train(tasks, backbone=str(there), output=tmp_path / "second", **start).path
    assert read_manifest(path).backbone.name == read_config(path / "config.yaml").backbone == str(there)
    with pytest.raises(BackboneError, match="the checkpoint's backbone"):
        sparse_ft.train(tasks, backbone=str(tiny_folder("gpt2")), output=tmp_path / "third", **start)


@pytest.mark.parametrize(("changes", "overrides", "error", "said"), [
    ({}, {"experts__rank": 32}, ConfigError, "'mood' of .* has 4"),
    ({}, {"experts__alpha": 3}, ConfigError, "'mood' of .* has 8"),
    ({}, {"experts__first_block": 1}, ConfigError, "'mood' of .* has 0"),
    ({}, {"experts__pooling": "first"}, ConfigError, r"experts\.pooling is first"),
    ({"labels": ["good", "sad"]}, {}, DataError, "'sad'"),
    ({"kind": "multi_label", "columns": {"text": "text", "labels": "label"}}, {}, DataError, "'mood' is a multi_label"),
])  # fmt: skip
def test_a_task_of_the_checkpoint_is_not_stretched_to_other_settings(tmp_path, old, changes, overrides, error, said):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4), **changes)
    if "labels" in changes:
        write_rows(tmp_path / "mood/train.jsonl", [{"text": "a", "label": label} for label in changes["labels"]])
    with pytest.raises(error, match=said):
        sparse_ft.train([task], from_checkpoint=old, output=tmp_path / "new", overrides=settings(**overrides))
    assert not (tmp_path / "new").exists()


# The same numbers again


def test_the_seed_decides_every_bit(tmp_path, tiny_bert):
    tasks, threads = small(tmp_path, "names", size=12), torch.get_num_threads()
    options = {"train__head_dropout": 0.3, "experts__dropout": 0.2, "train__batch_size": 4, "train__workers": 3}
    first, again, other = (
        tensors(run(tasks, tiny_bert, tmp_path / folder, seed=seed, **options).path)
        for folder, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert equal(first, again)
    assert first.keys() == other.keys()
    assert not any(torch.equal(first[key], other[key]) for key in first if not key.endswith("block"))
    assert torch.get_num_threads() == threads


def test_the_parts_of_a_batch_change_no_result(tmp_path, tiny_bert, monkeypatch):
    # Plain descent: AdamW divides by the size of the gradient, so rounding noise on one near 0 becomes a whole step.
    def descent(parameters, run):
        rate = run.train.learning_rate
        return torch.optim.SGD([{"params": list(parameters.values()), "lr": rate, "base_lr": rate}])

    monkeypatch.setattr(fitting, "build_optimizer", descent)
    task = write_toy(tmp_path, "names", sizes=(30, 4, 4))
    start, undivided, parts = (
        tensors(run([task], tiny_bert, tmp_path / str(number), train__epochs=1, **changes).path)
        for number, changes in enumerate([
            {"train__learning_rate": 1e-12},
            {"train__learning_rate": 0.5},
            {"train__learning_rate": 0.5, "train__accumulation": 2, "train__workers": 3},
        ])
    )  # fmt: skip
    for key, tensor in undivided.items():
        torch.testing.assert_close(parts[key], tensor, atol=1e-5, rtol=0, msg=key)
    moved = max(float((tensor - start[key]).abs().max()) for key, tensor in undivided.items())
    assert moved > 1e-2  # a thousand times the tolerance


def test_adamw_takes_the_gradients_of_workers_for_what_they_are(tmp_path, tiny_bert):
    """Fused AdamW reads a transposed gradient by address and gives each number the step of another one."""
    task = write_toy(tmp_path, "mood", sizes=(32, 4, 4))
    start, one, two = (
        tensors(run([task], tiny_bert, tmp_path / str(number), train__epochs=3, **changes).path)
        for number, changes in enumerate([
            {"train__learning_rate": 1e-12, "train__weight_decay": 0.0},
            {"train__workers": 1, "experts__dropout": 1e-9},  # takes the way of dropout, and drops nothing
            {"train__workers": 2, "experts__dropout": 1e-9},
        ])
    )  # fmt: skip
    for key, tensor in one.items():
        moved = (tensor - start[key]).abs().mean()
        assert float((two[key] - tensor).abs().mean()) <= 0.05 * float(moved), key


def test_tasks_of_one_run_are_trained_as_each_alone_bit_for_bit(tmp_path, tiny_bert, monkeypatch):
    made, alive, build = [], [], fitting.build_optimizer

    def watched(parameters, run):
        alive.append(sum(reference() is not None for reference in made))
        optimizer = build(parameters, run)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(fitting, "build_optimizer", watched)
    tasks = [write_toy(tmp_path, name, sizes=(size, 4, 4)) for name, size in (("mood", 14), ("names", 8))]
    options = {"train__batch_size": 8, "train__head_dropout": 0.2, "experts__dropout": 0.1, "train__workers": 2}
    together = load_checkpoint(run(tasks, tiny_bert, tmp_path / "all", **options).path).model
    assert alive == [0, 0]  # the optimizer of a task goes with it
    for task, name in zip(tasks, ("mood", "names"), strict=True):
        alone = load_checkpoint(run([task], tiny_bert, tmp_path / f"out-{name}", **options).path).model
        assert equal(dict(trainable_of(alone, name)), dict(trainable_of(together, name)))


# When to stop, and which state to keep


def test_few_rows_are_passed_over_several_times_between_evaluations(tmp_path, tiny_bert, caplog):
    caplog.set_level("INFO", "sparse_ft")
    task = write_toy(tmp_path, "mood", sizes=(6, 4, 4))
    options = {"train__min_steps": 40, "train__batch_size": 4, "train__patience": 1, "train__learning_rate": 1e-12}
    first, second = run([task], tiny_bert, tmp_path / "out", **options).history  # the second is no better
    assert (first["step"], second["step"]) == (4, 8)  # 2 batches a pass, a tenth of 40 at least
    assert "Training of mood stopped early at step 8 of 40" in caplog.text


def test_each_task_has_its_own_patience_and_keeps_its_best_state(tmp_path, tiny_bert, monkeypatch):
    scores = {"mood": [0.9, 0.1, 0.1], "about": [0.1, 0.2, 0.7, 0.2, 0.7]}  # of equal scores the last
    states, predict, score_rows = {name: [] for name in scores}, fitting.predict_rows, fitting.score_rows

    def watching(model, spec, data):
        state = {name: value.detach().clone() for name, value in trainable_of(model, spec.name).items()}
        states[spec.name].append(state)
        return predict(model, spec, data)

    def scripted(spec, data, predictions):
        score = score_rows(spec, data, predictions)
        score.metrics[spec.metric] = scores[spec.name][len(states[spec.name]) - 1]
        return score

    monkeypatch.setattr(fitting, "predict_rows", watching)
    monkeypatch.setattr(fitting, "score_rows", scripted)
    tasks = small(tmp_path, *scores)
    result = run(tasks, tiny_bert, tmp_path / "out", train__epochs=5, train__patience=2)
    assert [entry["validation"] for entry in result.history] == [
        {name: score} for name, values in scores.items() for score in values
    ]
    model = load_checkpoint(result.path).model
    for name, best, other in (("mood", 0, 2), ("about", 4, 2)):
        assert equal(dict(trainable_of(model, name)), states[name][best])
        assert not equal(states[name][best], states[name][other])
    assert json.loads((result.path / "metrics.json").read_text())["mood"]["validation"] == 0.9


# Settings


def test_a_mixture_trains_every_task_that_shares_an_expert(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(size, 4, 4)) for name, size in (("mood", 20), ("about", 4))]
    options = {"train__mixture": "uniform", "train__epochs": 1, "train__batch_size": 8, "experts__pool": 1}
    (epoch,) = run(tasks, tiny_bert, tmp_path / "out", **options).history
    assert set(epoch["loss"]) == set(epoch["validation"]) == {"mood", "about"}
    assert epoch["step"] in (3, 4)  # an epoch is as long as all tasks together, whatever the mixture


def test_settings_decide_layers_rows_and_epochs(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4), labels={"good": "gut", "bad": "schlecht"})
    overrides = settings(train__epochs=3, train__batch_size=6, data__train_limit=9)
    overrides += ["experts.first_block=1", "experts.targets=[query, value]"]
    config = load_config(overrides=overrides, values={"tasks": [task], "backbone": str(tiny_bert)})
    result = sparse_ft.train(config=config, output=tmp_path / "out", device="cpu", overrides=["train.epochs=2"])
    assert [entry["step"] for entry in result.history] == [2, 4]  # 9 rows, 6 a step
    written = RunConfig.model_validate(yaml.safe_load((result.path / "config.yaml").read_text()))
    assert written.train == config.train.model_copy(update={"epochs": 2})
    assert written.tasks == [task]
    names = [f"encoder.layer.{block}.attention.self.{target}" for block in (1, 2) for target in ("query", "value")]
    assert sorted(load_checkpoint(result.path).model.experts.layers) == sorted(names)
    assert result.tasks["mood"].label_names == ["gut", "schlecht"]  # those of the task file, in its order
    assert sparse_ft.load(result.path, device="cpu")("loved").tasks["mood"]["label"] in {"gut", "schlecht"}


def test_label_smoothing_bounds_the_loss_from_below(tmp_path, tiny_bert):
    (task,) = small(tmp_path, "mood", size=24)
    options = {"train__epochs": 6, "train__batch_size": 8}
    plain = run([task], tiny_bert, tmp_path / "plain", **options).history[-1]["loss"]["mood"]
    smoothed = run([task], tiny_bert, tmp_path / "smooth", train__label_smoothing=0.4, **options)
    target = torch.tensor([0.8, 0.2])  # 1 - 0.4 + 0.4 / 2
    entropy = -(target * target.log()).sum().item()
    assert plain < entropy / 2
    assert entropy - 1e-6 <= smoothed.history[-1]["loss"]["mood"] < entropy + 0.2


def test_runs_side_by_side_take_different_folders(tmp_path, tiny_bert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = small(tmp_path, "mood")
    load, paths = training.load_backbone, []

    def beside(*args, **kwargs):
        monkeypatch.setattr(training, "load_backbone", load)
        paths.append(run(tasks, tiny_bert, None, train__epochs=1).path)
        return load(*args, **kwargs)

    monkeypatch.setattr(training, "load_backbone", beside)
    paths.append(run(tasks, tiny_bert, None, train__epochs=1).path)
    assert [path.name for path in paths] == ["mood-2", "mood"]
    with pytest.raises(SparseFTError):
        run(tasks, tmp_path / "nothing", None)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mood", "mood-2"]


# What goes wrong


def raising(error):
    def loss(self, logits, targets, **_):
        raise error

    return loss


@pytest.mark.parametrize(("loss", "error", "said"), [
    (lambda self, logits, targets, **_: logits.sum() * float("nan"), SparseFTError,
     r"'mood' .* nan at step 1\. .*train\.learning_rate"),
    (raising(torch.OutOfMemoryError("CUDA out of memory")), SparseFTError,
     r"train\.batch_size=16 .*data\.max_length=256.*train\.accumulation=6"),
    (raising(MemoryError()), SparseFTError, r"train\.accumulation=6"),
    (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), SparseFTError,
     r"train\.accumulation=6"),
    (raising(RuntimeError("a bug")), RuntimeError, "a bug"),
])  # fmt: skip
def test_a_failed_run_says_why_and_leaves_nothing_that_is_in_the_way(
    tmp_path, tiny_bert, monkeypatch, loss, error, said
):
    tasks = small(tmp_path, "mood")
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", loss)
        with pytest.raises(error, match=said):
            run(tasks, tiny_bert, tmp_path / "out", train__accumulation=3)
    if said == "a bug":  # the same --output may be used again
        assert (run(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path / "manifest.json").is_file()


@pytest.mark.parametrize(("changes", "split", "row", "error", "said"), [
    ({}, "test", {"text": None, "label": "bad"}, DataError, r"test\.jsonl', line 1: text is null"),
    ({}, "validation", {"text": "a", "label": None}, DataError, "8 training and 0 validation rows"),
    ({"out_of_scope": "Bad"}, None, None, DataError, r"'mood': .*'Bad'\. Did you mean 'bad'"),
])  # fmt: skip
def test_rows_that_cannot_be_used_show_before_training(
    tmp_path, tiny_bert, monkeypatch, changes, split, row, error, said
):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4), **changes)
    if split is not None:
        write_rows(tmp_path / f"mood/{split}.jsonl", [row])
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error, match=said):
        run([task], tiny_bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tagging_with_a_causal_backbone_warns(tmp_path, tiny_gpt2, caplog):
    run(small(tmp_path, "mood", "names"), tiny_gpt2, tmp_path / "out", train__epochs=1)
    warned = [record.getMessage() for record in caplog.records if "causal" in record.getMessage()]
    assert len(warned) == 1
    assert "names" in warned[0]


# Data in memory


def test_data_in_memory_trains_the_weights_of_the_same_rows_in_a_file(tmp_path, tiny_bert):
    rows = toy_rows("mood", 40)
    write_rows(tmp_path / "mood.jsonl", rows)
    spec = TaskSpec(name="mood", kind="classification", metric="accuracy")
    options = {**ONE, "backbone": str(tiny_bert)}
    file = sparse_ft.train(spec, data=tmp_path / "mood.jsonl", output=tmp_path / "file", **options)
    assert read_config(file.path / "config.yaml").sources == {"mood": str(tmp_path / "mood.jsonl")}
    data = {"mood": datasets.Dataset.from_list(rows)}
    result = sparse_ft.train([spec], data=data, output=tmp_path / "memory", **options)
    assert equal(tensors(result.path), tensors(file.path))
    assert (result.scores, result.history) == (file.scores, file.history)
    config = read_config(result.path / "config.yaml")
    assert (config.tasks, config.sources) == (["mood"], {})


# Several problems at once


def test_all_problems_of_a_run_are_told_in_one_error(tmp_path, old):
    tasks, wrong = small(tmp_path, "about"), ["experts.pooling=first", "experts.shared=true", "gate.shortlist=2"]
    with pytest.raises(ConfigError) as caught:
        sparse_ft.train([*tasks, *tasks], from_checkpoint=old, overrides=wrong, output=old)
    for problem in ("Two tasks have the same name", "experts.pooling is first", "experts.shared is for",
                    "gate.shortlist is for tokens", "holds a checkpoint already"):  # fmt: skip
        assert problem in str(caught.value)
    with pytest.raises(ConfigError, match=r"gate\.block is 9.*gate\.top_k is 8"):
        sparse_ft.train(tasks, from_checkpoint=old, overrides=["gate.block=9", "gate.top_k=8"], output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
