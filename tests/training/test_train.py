"""Training on toy tasks whose answer hangs on a few words, with tiny backbones."""

import json
import shutil
import weakref

import pytest
import torch
import yaml
from toy_checkpoints import equal, logits_of, tensors, trainable_of
from toys import KINDS, run, settings, write_rows, write_toy

import sparse_ft
from sparse_ft.backbone.backbone import load_backbone, set_attention
from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.checkpoint.manifest import read_config, read_manifest
from sparse_ft.config import RunConfig, load_config
from sparse_ft.errors import BackboneError, ConfigError, DataError, SparseFTError
from sparse_ft.evaluation.scoring import predict_rows
from sparse_ft.tasks.encoded_rows import prepare
from sparse_ft.tasks.kinds.classification import Classification
from sparse_ft.tasks.reading import read
from sparse_ft.training import loop as fitting
from sparse_ft.training import train as training


@pytest.fixture
def caught_model(monkeypatch):
    """The model as it is when the checkpoint is written."""
    from sparse_ft.training import train as training

    caught, save = [], training.save_checkpoint

    def catch(path, *, model, **rest):
        caught.append(model)
        save(path, model=model, **rest)

    monkeypatch.setattr(training, "save_checkpoint", catch)
    return caught


# What is learnt


@pytest.mark.parametrize(("name", "metric", "least"), [
    ("mood", "accuracy", 0.85),
    ("reply", "accuracy", 0.85),
    ("about", "micro_f1", 0.85),
    ("names", "f1", 0.85),
])  # fmt: skip
def test_every_kind_learns_a_task_that_can_be_learnt(tmp_path, tiny_bert, name, metric, least):
    task = write_toy(tmp_path, name, sizes=(240, 48, 48))
    options = {"train__epochs": 6, "train__batch_size": 8, "train__learning_rate": 0.005}
    result = run([task], tiny_bert, tmp_path / "out", **options)
    assert result.scores[name][metric] >= least  # seeds 13 to 20 score 0.94 at least
    assert result.history[-1]["loss"][name] < result.history[0]["loss"][name] / 2
    assert result.evaluation.splits == {name: "test"}


def test_minilm_learns_two_tasks_at_once(minilm_toys):
    scores = sparse_ft.evaluate(minilm_toys, device="cpu").tasks
    assert scores["mood"].score.metrics["accuracy"] > 0.8
    assert scores["names"].score.metrics["f1"] > 0.6


@pytest.mark.parametrize("name", ["mood", "names"])
def test_pretrained_decoder_learns(tmp_path, stories260k, name):
    result = run([write_toy(tmp_path, name)], stories260k, tmp_path / "out", train__epochs=5, train__batch_size=8)
    assert result.scores[name]["accuracy" if name == "mood" else "f1"] > 0.6
    example = "the table boring" if name == "mood" else "the table in London"
    answer = sparse_ft.load(result.path, device="cpu")(example).tasks[name]
    assert answer["label"] == "bad" if name == "mood" else isinstance(answer["entities"], list)


@pytest.mark.parametrize("family", ["gpt2", "deberta-v2", "llama"])
@pytest.mark.parametrize("name", ["mood", "names"])
def test_every_family_trains_and_comes_back_the_same(tmp_path, tiny_folder, caught_model, family, name):
    task = write_toy(tmp_path, name, sizes=(16, 4, 4))
    path = run([task], tiny_folder(family), tmp_path / "out", train__epochs=1, train__batch_size=8).path
    texts = ["the table loved", "", "Ada Lovelace in London and then a weather of at six", "half"]
    loaded = load_checkpoint(path)
    set_attention(loaded.model.backbone, caught_model[0].backbone.config._attn_implementation)
    now, then = logits_of(loaded.model, name, texts), logits_of(caught_model[0], name, texts)
    assert all(torch.equal(left, right) for left, right in zip(now, then, strict=True))
    assert not any(torch.equal(row[:1], now[0][:1]) for row in now[2:])  # the logits depend on the text
    for expert in [loaded.model.experts.get(name)]:
        assert any(lora_b.abs().max() > 0 for _, lora_b in expert.deltas.values())


# What is touched and what is not


def test_tasks_of_one_run_have_an_expert_and_a_head_each(tmp_path, tiny_bert, caught_model):
    tasks = [write_toy(tmp_path, name, sizes=(16, 4, 4)) for name in KINDS]
    path = run(tasks, tiny_bert, tmp_path / "out", train__epochs=1).path
    assert sorted(file.name for file in (path / "experts").iterdir()) == sorted(KINDS)
    assert sorted(file.stem for file in (path / "heads").iterdir()) == sorted(KINDS)
    deltas = [load_checkpoint(path).model.experts.get(name).deltas for name in KINDS]
    module = next(iter(deltas[0]))
    for place, one in enumerate(deltas):
        assert one.keys() == deltas[0].keys()
        assert one[module][1].abs().max() > 0
        assert not any(torch.equal(one[module][1], other[module][1]) for other in deltas[:place])
    trained = {name.replace(".frozen.", "."): tensor for name, tensor in caught_model[0].encoder.named_parameters()}
    for name, tensor in load_backbone(str(tiny_bert)).model.named_parameters():
        assert torch.equal(trained[name], tensor), name


def test_a_new_task_leaves_the_kept_ones_as_they_were(tmp_path, tiny_bert):
    old = run([write_toy(tmp_path, "mood", sizes=(16, 8, 8))], tiny_bert, tmp_path / "old", train__epochs=1).path
    new = sparse_ft.train(
        [write_toy(tmp_path, "names", sizes=(16, 8, 8))],
        from_checkpoint=old,
        output=tmp_path / "new",
        overrides=settings(train__epochs=1, experts__rank=4),
        device="cpu",
    ).path
    for name in ("experts/mood/adapter_model.safetensors", "experts/mood/adapter_config.json",
                 "heads/mood.safetensors", "tasks/mood.yaml"):  # fmt: skip
        assert (old / name).read_bytes() == (new / name).read_bytes(), name
    texts = ["the table loved", "boring", "at six " * 30]
    before, after = sparse_ft.load(old, device="cpu"), sparse_ft.load(new, device="cpu")
    assert torch.equal(before.logits(texts, "mood"), after.logits(texts, "mood"))
    assert list(after.tasks) == ["mood", "names"]
    scores, kept = (json.loads((folder / "metrics.json").read_text())["mood"] for folder in (old, new))
    assert {**kept, **scores} == kept  # and how often the gate, now that there is one, is right
    assert after.checkpoint.manifest["experts"]["names"]["rank"] == 4


def test_the_backbone_of_a_checkpoint_to_start_from_may_have_moved(tmp_path, tiny_folder, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 4, 4)) for name in ("mood", "about")]
    here, there = (shutil.copytree(tiny_bert, tmp_path / name) for name in ("here", "there"))
    first = run(tasks[:1], here, tmp_path / "first", train__epochs=1).path
    shutil.rmtree(here)
    options = {"from_checkpoint": first, "overrides": settings(train__epochs=1), "device": "cpu"}
    path = sparse_ft.train(tasks[1:], backbone=str(there), output=tmp_path / "second", **options).path
    assert read_manifest(path)["backbone"]["name"] == read_config(path / "config.yaml").backbone == str(there)
    other = str(tiny_folder("gpt2"))
    with pytest.raises(BackboneError, match="which is not that of the checkpoint's backbone"):
        sparse_ft.train(tasks[1:], backbone=other, output=tmp_path / "third", **options)
    with pytest.raises(
        ConfigError, match=r"experts\.pooling is first, but the tasks of .* pool by unit\. Leave it out"
    ):
        sparse_ft.train(
            tasks[1:],
            from_checkpoint=first,
            backbone=str(there),
            overrides=settings(experts__pooling="first"),
            output=tmp_path / "third",
        )


def test_runs_side_by_side_take_different_folders(tmp_path, tiny_bert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    load, paths = training.load_backbone, []

    def beside(*args, **kwargs):
        monkeypatch.setattr(training, "load_backbone", load)
        paths.append(run([task], tiny_bert, None, train__epochs=1).path)
        return load(*args, **kwargs)

    monkeypatch.setattr(training, "load_backbone", beside)
    paths.append(run([task], tiny_bert, None, train__epochs=1).path)
    assert [path.name for path in paths] == ["mood-2", "mood"]
    with pytest.raises(SparseFTError):
        run([task], tmp_path / "nothing", None)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mood", "mood-2"]


def test_a_kept_task_is_trained_further_when_it_is_named(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "about")]
    old = run(tasks, tiny_bert, tmp_path / "old", train__epochs=1).path
    new = sparse_ft.train(
        tasks[:1], from_checkpoint=old, output=tmp_path / "new", overrides=settings(train__epochs=1), device="cpu"
    ).path
    before, after = (
        {name: tensor for name, tensor in tensors(folder).items() if not name.startswith("gate")}
        for folder in (old, new)
    )
    assert before.keys() == after.keys()
    same = {name.split("/")[1].partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    changed = {name.split("/")[1].partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "about" in same
    assert changed == {"mood"}


def test_a_kept_expert_is_not_stretched_to_other_settings(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "about")]
    old = run(tasks[:1], tiny_bert, tmp_path / "old", train__epochs=1).path
    for asked, own in (
        ({"experts__rank": 32}, "8"),
        ({"experts__alpha": 3}, "16.0"),
        ({"experts__first_block": 1}, "0"),
    ):
        options = {"from_checkpoint": old, "overrides": settings(train__epochs=1, **asked), "device": "cpu"}
        with pytest.raises(ConfigError, match=f"the expert 'mood' of .*, which is trained further, has {own}. Leave"):
            sparse_ft.train(tasks[:1], output=tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()
    sparse_ft.train(tasks[1:], output=tmp_path / "other", **options)  # a new expert heeds them


def test_a_kept_head_is_not_stretched_to_new_labels(tmp_path, tiny_bert):
    old = run([write_toy(tmp_path, "mood", sizes=(16, 8, 8))], tiny_bert, tmp_path / "old", train__epochs=1).path
    task = write_toy(tmp_path / "other", "mood", sizes=(16, 8, 8))
    write_rows(tmp_path / "other/mood/train.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "sad"}])
    with pytest.raises(DataError, match=r"has no label 'sad'\. Its head was trained on: bad, good\. Rename the task"):
        sparse_ft.train([task], from_checkpoint=old, output=tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_a_kept_head_keeps_the_order_of_its_labels(tmp_path, tiny_bert):
    first = write_toy(tmp_path, "mood", sizes=(16, 8, 8), labels={"bad": "bad", "good": "good"})
    old = run([first], tiny_bert, tmp_path / "old", train__epochs=1).path
    turned = write_toy(tmp_path / "other", "mood", sizes=(16, 8, 8), labels={"good": "good", "bad": "bad"})
    new = sparse_ft.train(
        [turned], from_checkpoint=old, output=tmp_path / "new", overrides=settings(train__epochs=1), device="cpu"
    )
    assert new.tasks["mood"].label_names == load_checkpoint(new.path).tasks["mood"].label_names == ["bad", "good"]
    assert new.history[-1]["validation"]["mood"] >= 0.5
    other = write_toy(tmp_path / "more", "mood", sizes=(16, 8, 8), kind="multi_label", columns={"labels": "label"})
    with pytest.raises(DataError, match=r"Task 'mood' is a multi_label, but in .* it is a classification"):
        sparse_ft.train([other], from_checkpoint=old, output=tmp_path / "out", device="cpu")


def test_test_rows_that_cannot_be_read_show_before_training(tmp_path, tiny_bert, monkeypatch):
    task = write_toy(tmp_path, "mood", sizes=(16, 8, 8))
    (tmp_path / "mood" / "test.jsonl").write_text('{"text": null, "label": "bad"}\n')
    monkeypatch.setattr("sparse_ft.training.train.fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(DataError, match=r"test\.jsonl', line 1: text is null"):
        run([task], tiny_bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_of_scope_label_must_be_one(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 8, 8), out_of_scope="Bad")
    with pytest.raises(DataError, match=r"out_of_scope of task 'mood': Unknown label 'Bad'\. Did you mean 'bad'"):
        run([task], tiny_bert, tmp_path / "out")


def test_kept_tasks_read_as_much_of_a_text_as_before(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(16, 8, 8)) for name in ("mood", "about")]
    short = {"train__epochs": 1, "data__max_length": 8}
    old = run(tasks[:1], tiny_bert, tmp_path / "old", **short).path
    new = sparse_ft.train(
        tasks[1:], from_checkpoint=old, output=tmp_path / "new", overrides=settings(train__epochs=1), device="cpu"
    ).path
    assert load_checkpoint(new).config.data.max_length == 8
    texts = ["the table loved " * 6]
    before, after = (sparse_ft.load(folder, device="cpu").logits(texts, "mood") for folder in (old, new))
    assert torch.equal(before, after)
    with pytest.raises(ConfigError, match=r"data\.max_length is 16, and 8 in .*, so task 'mood' would read long texts"):
        sparse_ft.train(
            tasks[1:], from_checkpoint=old, output=tmp_path / "out", overrides=["data.max_length=16"], device="cpu"
        )


def test_first_block_and_targets_decide_which_layers_are_experts(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 8, 8))
    path = run(
        [task],
        tiny_bert,
        tmp_path / "out",
        train__epochs=1,
        experts__first_block=1,
        experts__targets=["query", "value"],
    ).path
    names = [f"encoder.layer.{block}.attention.self.{target}" for block in (1, 2) for target in ("query", "value")]
    assert sorted(load_checkpoint(path).model.experts.layers) == sorted(names)


# The same numbers again


def test_the_seed_decides_every_bit(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(24, 8, 8))
    options = {"train__head_dropout": 0.3, "experts__dropout": 0.2, "train__batch_size": 8}
    first, again, other = (
        tensors(run([task], tiny_bert, tmp_path / name, seed=seed, **options).path)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert equal(first, again)
    assert first.keys() == other.keys()
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", ["mood", "names"])
@pytest.mark.parametrize(("accumulation", "workers"), [(3, 1), (1, 2), (2, 3)])
def test_the_parts_of_a_batch_change_no_result(tmp_path, tiny_bert, monkeypatch, name, accumulation, workers):
    # Plain descent: AdamW divides by the size of the gradient, so rounding noise on one near 0 becomes a whole step.
    def descent(parameters, run):
        rate = run.train.learning_rate
        return torch.optim.SGD([{"params": list(parameters.values()), "lr": rate, "base_lr": rate}])

    monkeypatch.setattr(fitting, "build_optimizer", descent)
    task = write_toy(tmp_path, name, sizes=(30, 8, 8))
    start, whole, parts = (
        tensors(run([task], tiny_bert, tmp_path / str(place), train__epochs=1, **changes).path)
        for place, changes in enumerate([
            {"train__learning_rate": 1e-12},
            {"train__learning_rate": 0.5},
            {"train__learning_rate": 0.5, "train__accumulation": accumulation, "train__workers": workers},
        ])
    )  # fmt: skip
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, atol=1e-5, rtol=0, msg=key)
    moved = max(float((tensor - start[key]).abs().max()) for key, tensor in whole.items())
    assert moved > 1e-2  # a thousand times the tolerance


def test_adamw_takes_the_gradients_of_workers_for_what_they_are(tmp_path, tiny_bert):
    """Fused AdamW reads a transposed gradient by address and gives each number the step of another one."""
    task = write_toy(tmp_path, "mood", sizes=(32, 8, 8))
    start, one, two = (
        tensors(run([task], tiny_bert, tmp_path / str(place), train__epochs=3, **changes).path)
        for place, changes in enumerate([
            {"train__learning_rate": 1e-12, "train__weight_decay": 0.0},
            {"train__workers": 1, "experts__dropout": 1e-9},  # takes the way of dropout, and drops nothing
            {"train__workers": 2, "experts__dropout": 1e-9},
        ])
    )  # fmt: skip
    for key, tensor in one.items():
        moved = (tensor - start[key]).abs().mean()
        assert float((two[key] - tensor).abs().mean()) <= 0.05 * float(moved), key


def test_workers_repeat_every_bit_and_leave_the_number_of_threads_alone(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(24, 8, 8)) for name in ("mood", "names")]
    options = {"train__head_dropout": 0.3, "experts__dropout": 0.2, "train__workers": 3}
    before = torch.get_num_threads()
    first, again = (tensors(run(tasks, tiny_bert, tmp_path / name, **options).path) for name in ("first", "again"))
    assert equal(first, again)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("mixture", ["proportional", "smoothed", "uniform"])
def test_every_mixture_trains_every_task_that_shares_an_expert(tmp_path, tiny_bert, mixture):
    tasks = [write_toy(tmp_path, name, sizes=(size, 4, 4)) for name, size in (("mood", 40), ("about", 4))]
    options = {"train__mixture": mixture, "train__epochs": 1, "train__batch_size": 8, "experts__pool": 1}
    result = run(tasks, tiny_bert, tmp_path / "out", **options)
    assert set(result.history[0]["loss"]) == set(result.history[0]["validation"]) == {"mood", "about"}
    assert result.history[0]["step"] in (6, 7)  # an epoch is as long as all tasks together, whatever the mixture


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_of_one_run_are_trained_as_each_alone_bit_for_bit(tmp_path, tiny_bert, workers):
    sizes = {"mood": (30, 8, 4), "about": (10, 4, 4), "names": (20, 8, 4)}
    tasks = [write_toy(tmp_path, name, sizes=size) for name, size in sizes.items()]
    options = {"train__epochs": 3, "train__batch_size": 8, "train__head_dropout": 0.2, "experts__dropout": 0.1}
    options["train__workers"] = workers
    together = load_checkpoint(run(tasks, tiny_bert, tmp_path / "all", **options).path).model
    for task, name in zip(tasks, sizes, strict=True):
        alone = load_checkpoint(run([task], tiny_bert, tmp_path / f"out-{name}", **options).path).model
        assert equal(dict(trainable_of(alone, name)), dict(trainable_of(together, name)))


def test_the_optimizer_of_a_task_goes_with_it(tmp_path, tiny_bert, monkeypatch):
    made, alive, build = [], [], fitting.build_optimizer

    def watched(parameters, run):
        alive.append(sum(reference() is not None for reference in made))
        optimizer = build(parameters, run)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(fitting, "build_optimizer", watched)
    tasks = [write_toy(tmp_path, name, sizes=(20, 8, 4)) for name in ("mood", "about", "names")]
    run(tasks, tiny_bert, tmp_path / "out")
    assert alive == [0, 0, 0]


# When to stop, and what to keep


def test_few_rows_are_passed_over_several_times_between_evaluations(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(6, 4, 4))
    options = {"train__min_steps": 100, "train__batch_size": 4, "train__patience": 1, "train__learning_rate": 1e-12}
    first, second = run([task], tiny_bert, tmp_path / "out", **options).history  # the second is no better
    assert (first["step"], second["step"]) == (10, 20)  # 2 batches a pass, a tenth of 100 at least


def test_of_equal_scores_the_latest_state_is_kept(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 1, 4))
    options = {"train__learning_rate": 1e-6}  # too low to change the answer on the one validation row
    one, three = (run([task], tiny_bert, tmp_path / str(epochs), train__epochs=epochs, **options) for epochs in (1, 3))
    assert len({epoch["validation"]["mood"] for epoch in three.history}) == 1
    steps = [load_checkpoint(result.path).model.experts.get("mood").deltas for result in (one, three)]
    moved = [max(float(lora_b.abs().max()) for _, lora_b in deltas.values()) for deltas in steps]
    assert moved[1] > 1.5 * moved[0]


def test_training_stops_when_no_task_gets_better(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 8, 8))
    result = run([task], tiny_bert, tmp_path / "out", train__learning_rate=1e-12, train__epochs=9, train__patience=2)
    assert len(result.history) == 3  # the first is the best, two more are no better
    assert len({entry["validation"]["mood"] for entry in result.history}) == 1


def test_each_task_has_its_own_patience(tmp_path, tiny_bert, monkeypatch):
    from sparse_ft.training import loop as fitting

    scores = {"mood": iter([0.9, 0.1, 0.1, 0.1, 0.1, 0.1]), "about": iter([0.1, 0.2, 0.3, 0.2, 0.2, 0.2])}
    score_rows = fitting.score_rows

    def scripted(spec, data, predictions):
        score = score_rows(spec, data, predictions)
        score.metrics[spec.metric] = next(scores[spec.name])
        return score

    monkeypatch.setattr(fitting, "score_rows", scripted)
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "about")]
    result = run(tasks, tiny_bert, tmp_path / "out", train__epochs=6, train__patience=2)
    assert [entry["validation"] for entry in result.history] == [
        *({"mood": score} for score in (0.9, 0.1, 0.1)),
        *({"about": score} for score in (0.1, 0.2, 0.3, 0.2, 0.2)),
    ]


def test_each_task_keeps_its_best_state(tmp_path, tiny_bert, monkeypatch):
    from sparse_ft.training import loop as fitting

    scores = {"mood": [0.1, 0.9, 0.5], "about": [0.7, 0.2, 0.7]}
    states, predict = {"mood": [], "about": []}, fitting.predict_rows
    score_rows = fitting.score_rows

    def watching(model, spec, data):
        states[spec.name].append(
            {name: value.detach().clone() for name, value in trainable_of(model, spec.name).items()}
        )
        return predict(model, spec, data)

    def scripted(spec, data, predictions):
        score = score_rows(spec, data, predictions)
        score.metrics[spec.metric] = scores[spec.name][len(states[spec.name]) - 1]
        return score

    monkeypatch.setattr(fitting, "predict_rows", watching)
    monkeypatch.setattr(fitting, "score_rows", scripted)
    tasks = [write_toy(tmp_path, name, sizes=(16, 4, 4)) for name in scores]
    path = run(tasks, tiny_bert, tmp_path / "out", train__epochs=3).path
    saved = load_checkpoint(path).model
    for name, best, other in (("mood", 1, 2), ("about", 2, 0)):  # of equal scores the last
        assert equal(dict(trainable_of(saved, name)), states[name][best])
        assert not equal(states[name][best], states[name][other])
    assert json.loads((path / "metrics.json").read_text())["mood"]["validation"] == 0.9


def test_the_best_score_is_that_of_the_saved_checkpoint(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(64, 40, 8)) for name in ("mood", "names")]
    result = run(tasks, tiny_bert, tmp_path / "out", train__epochs=4)
    again = sparse_ft.evaluate(result.path, split="validation", device="cpu")
    metrics = json.loads((result.path / "metrics.json").read_text())
    for name, metric in (("mood", "accuracy"), ("names", "f1")):
        best = max(entry["validation"][name] for entry in result.history if name in entry["validation"])
        assert metrics[name]["validation"] == best == pytest.approx(again.tasks[name].score.metrics[metric], abs=1e-12)
        assert metrics[name]["split"] == "test"
        assert metrics[name]["metrics"] == result.scores[name]


# Settings


def test_train_limit_uses_so_many_rows_of_each_task(tmp_path, tiny_bert):
    tasks = [write_toy(tmp_path, name, sizes=(40, 4, 4)) for name in ("mood", "about")]
    result = run(tasks, tiny_bert, tmp_path / "out", data__train_limit=9, train__batch_size=6, train__epochs=2)
    assert [entry["step"] for entry in result.history] == [2, 4, 2, 4]  # 9 rows each, 6 a step


def test_small_data_is_repeated_until_there_are_enough_steps(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    result = run([task], tiny_bert, tmp_path / "out", train__min_steps=5, train__batch_size=4, train__epochs=1)
    assert [entry["step"] for entry in result.history] == [2, 4, 6]


def test_label_smoothing_bounds_the_loss_from_below(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(8, 4, 4))
    options = {"train__epochs": 15, "train__batch_size": 8}
    plain = run([task], tiny_bert, tmp_path / "plain", **options).history[-1]["loss"]["mood"]
    smoothed = run([task], tiny_bert, tmp_path / "smooth", train__label_smoothing=0.4, **options)
    target = torch.tensor([0.8, 0.2])  # 1 - 0.4 + 0.4 / 2
    entropy = -(target * target.log()).sum().item()
    assert plain < entropy / 2
    assert entropy - 1e-6 <= smoothed.history[-1]["loss"]["mood"] < entropy + 0.2


def test_bf16_backbone_trains_float32_experts(tmp_path, tiny_bert, caught_model):
    task = write_toy(tmp_path, "mood")
    result = run([task], tiny_bert, tmp_path / "out", train__precision="bf16", train__epochs=5, train__batch_size=8)
    assert {value.dtype for value in trainable_of(caught_model[0], "mood").values()} == {torch.float32}
    assert caught_model[0].encoder.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors(result.path).values()} == {torch.float32}
    assert result.history[-1]["loss"]["mood"] < 0.8 * result.history[0]["loss"]["mood"]


def test_a_run_config_is_taken_as_it_is(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    config = load_config(overrides=settings(train__epochs=3), values={"tasks": [task], "backbone": str(tiny_bert)})
    result = sparse_ft.train(config=config, output=tmp_path / "out", device="cpu", overrides=["train.epochs=1"])
    assert len(result.history) == 1
    saved = RunConfig.model_validate(yaml.safe_load((result.path / "config.yaml").read_text()))
    assert saved.train == config.train.model_copy(update={"epochs": 1})
    assert saved.tasks == [task]


def test_labels_are_those_of_the_task_file_in_its_order(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4), labels={"good": "gut", "bad": "schlecht"})
    result = run([task], tiny_bert, tmp_path / "out", train__epochs=1)
    assert result.tasks["mood"].label_names == ["gut", "schlecht"]
    model = sparse_ft.load(result.path, device="cpu")
    assert model.logits(["a", "b"], "mood").shape == (2, 2)
    assert model("loved").tasks["mood"]["label"] in {"gut", "schlecht"}
    rows = read(model.tasks["mood"], splits=["test"])["test"].to_dict()
    data = prepare(rows, spec=model.tasks["mood"], encoder=model.encoder)
    assert set(predict_rows(model.checkpoint.model, model.tasks["mood"], data)) <= {"gut", "schlecht"}


# What goes wrong


def test_a_loss_that_is_not_finite_names_task_and_step(tmp_path, tiny_bert, monkeypatch):
    monkeypatch.setattr(Classification, "loss", lambda self, logits, targets, **_: logits.sum() * float("nan"))
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    with pytest.raises(SparseFTError, match=r"'mood' became nan at step 1\. Lower train\.learning_rate \(now 0\.01\)"):
        run([task], tiny_bert, tmp_path / "out")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_out_of_memory_says_what_to_lower(tmp_path, tiny_bert, monkeypatch, error):
    def full(self, logits, targets, **_):
        raise error

    monkeypatch.setattr(Classification, "loss", full)
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    expected = r"Out of memory on cpu with train\.batch_size=16 .*data\.max_length=256.*--set train\.accumulation=6"
    with pytest.raises(SparseFTError, match=expected):
        run([task], tiny_bert, tmp_path / "out", train__accumulation=3)


def test_other_runtime_errors_are_not_called_out_of_memory(tmp_path, tiny_bert, monkeypatch):
    def broken(self, logits, targets, **_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Classification, "loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run([write_toy(tmp_path, "mood", sizes=(16, 4, 4))], tiny_bert, tmp_path / "out")


def test_tagging_with_a_causal_backbone_warns(tmp_path, tiny_gpt2, caplog):
    tasks = [write_toy(tmp_path, name, sizes=(8, 4, 4)) for name in ("mood", "names")]
    run(tasks, tiny_gpt2, tmp_path / "out", train__epochs=1)
    warned = [record.getMessage() for record in caplog.records if "causal" in record.getMessage()]
    assert len(warned) == 1
    assert "Task names will tag better on a BERT" in warned[0]


def test_a_task_without_known_validation_answers_is_refused(tmp_path, tiny_bert):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    write_rows(tmp_path / "mood/validation.jsonl", [{"text": "a", "label": None}])
    with pytest.raises(DataError, match="16 training and 0 validation rows with answers"):
        run([task], tiny_bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_task_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"No task is given\. Name at least one"):
        sparse_ft.train([], output=tmp_path / "out")


def test_a_failed_run_leaves_nothing_that_is_in_the_way(tmp_path, tiny_bert, monkeypatch):
    task = write_toy(tmp_path, "mood", sizes=(16, 4, 4))
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", lambda self, logits, targets, **_: logits.sum() * float("nan"))
        with pytest.raises(SparseFTError):
            run([task], tiny_bert, tmp_path / "out")
    run([task], tiny_bert, tmp_path / "out", train__epochs=1)  # the same --output may be used again
    assert (tmp_path / "out/manifest.json").is_file()
